"""Puts each demo's folder on the path, as running its script does; so their modules' names must differ."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = sorted({str(file.parent) for file in EXAMPLES.glob("*/*.py")})


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models whose tensors are too small to share; their demos ask for one thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_pictures(folder: Path, name: str) -> None:
    """Both styles were written by common/panels.py."""
    for style in ("light", "dark"):
        assert (folder / f"{name}_{style}.png").read_bytes().startswith(b"\x89PNG")
