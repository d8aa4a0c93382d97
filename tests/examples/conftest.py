"""Puts the demos' folders on the path, as running their scripts does."""

import sys
from pathlib import Path

for folder in ("digits_vit", "digits_jacobian"):
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / folder))
