"""Puts each demo's folder on the path, as running its script does; so their modules' names must differ."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = sorted({str(file.parent) for file in EXAMPLES.glob("*/*.py")})
