"""Puts the demos' folders on the path, as running their scripts does."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "examples" / name) for name in ("digits_vit", "glimpses")]
