"""docs/maps.md: its code runs, its pictures are there, and each function of torch_attn.plot has its place in it."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from torch import nn

from torch_attn import plot, replace_mha

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "maps.md").read_text(encoding="utf-8")
PAGES = [DOCS.parent / "README.md", *DOCS.glob("*.md")]


def test_the_code_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layer = nn.TransformerEncoderLayer(32, 4, 32, batch_first=True)
    names = {
        "query": torch.randn(1, 4, 12, 8),
        "key": torch.randn(1, 4, 12, 8),
        "model": replace_mha(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)),
        "inputs": torch.randn(1, 12, 32),
        "tokens": list("abcdefghijkl"),
        "long_map": torch.rand(400, 400),
        "cross_map": torch.rand(10, 17),
        "image": torch.rand(8, 8),
        "class_token_map": torch.rand(17),
        "spectrogram": torch.randn(20, 60),
        "frame_map": torch.rand(3, 30),
        "heads_by_features": torch.rand(4, 30),
        "names": [f"name {place}" for place in range(30)],
    }
    for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(compile(code, "docs/maps.md", "exec"), names)
    assert (tmp_path / "maps.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "map.svg").exists()
    assert len(names["axes"][1].images) == 1
    pyplot.close("all")


def test_each_picture_is_there_light_and_dark_and_small() -> None:
    named = {name for page in PAGES for name in re.findall(r"images/(\w+\.png)", page.read_text(encoding="utf-8"))}
    assert named == {file.name for file in (DOCS / "images").iterdir()}
    for name in named:
        assert name.replace("light", "dark") in named and name.replace("dark", "light") in named
        content = (DOCS / "images" / name).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and len(content) < 150_000 and max(width, height) <= 1600


def test_the_guide_shows_every_function() -> None:
    assert set(re.findall(r"plot\.(\w+)\(", GUIDE)) >= set(plot.__all__) - {"Page"}
