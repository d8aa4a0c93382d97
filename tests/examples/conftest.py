"""Puts the demo's folder on the path, as running its script does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "digits_vit"))
