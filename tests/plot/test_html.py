"""html: what the page's text holds. What it does in a browser is in test_page.py."""

from __future__ import annotations

import base64
import html.parser
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from torch_attn import plot

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<!--",
    "<img src=x onerror='window.pwned=1'>",
    "&lt;",
    "{{data}}",
]
HOSTILE += ['"', "\\", "\u2028", "é 中 🙂", "${window.pwned = 1}", "]]>", "\n"]


class Reader(html.parser.HTMLParser):
    """Collects elements, attributes and texts, and checks that each element that opens is closed."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def payload(page: str) -> dict:
    return json.loads(Reader(page).texts["script"][0])


def weights_in(page: str, heads: int) -> numpy.ndarray:
    """The maps that the page shows, as its script reads them."""
    data = payload(page)
    shape = (heads, data["query"]["cells"], data["key"]["cells"])
    levels = numpy.frombuffer(base64.b64decode(data["weights"]), numpy.uint8).reshape(shape)
    scales = numpy.frombuffer(base64.b64decode(data["scales"]), "<f4").reshape(shape[:2])
    return levels / data["levels"] * scales[..., None]


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (3, 5, 5), (4, 8, 64, 64), (1, 3, 6, 6)])
def test_each_weight_is_within_two_thousandths_of_its_rows_largest(shape: tuple[int, ...]) -> None:
    weights = (3 * torch.randn(shape)).softmax(-1)
    flat = weights.reshape(-1, *shape[-2:]).double().numpy()
    stored = weights_in(plot.html(weights), len(flat))
    assert (abs(stored - flat) <= 0.002 * flat.max(-1, keepdims=True)).all()


def test_rows_without_attention_are_zero() -> None:
    assert (weights_in(plot.html(torch.zeros(4, 4)), 1) == 0).all()


def test_a_large_map_is_binned_and_the_page_says_so() -> None:
    weights = torch.rand(2, 1000, 600)
    page = plot.html(weights, max_cells=100)
    cells = weights.view(2, 100, 10, 100, 6).mean((2, 4))
    assert numpy.allclose(weights_in(page, 2), cells.numpy(), atol=0.004)
    (about,) = Reader(page).texts["p"][:1]
    assert "Each cell is the mean weight of 10 by 6 tokens." in about
    assert "within 0.2 % of its row's largest" in about
    assert len(page) < 80_000


def test_layers_come_from_sequences_mappings_and_records() -> None:
    one, two = torch.rand(2, 4, 4), torch.rand(3, 4, 4)

    class Record:
        maps = {"a.0": [torch.rand(1, 2, 4, 4), one[None]], "a.1": [two[None]]}

    for given in ([one, two], {"a.0": one, "a.1": two}, Record()):
        page = plot.html(given)
        assert payload(page)["counts"] == [2, 3]
        assert numpy.allclose(weights_in(page, 5), torch.cat([one, two]).numpy(), atol=0.002)
        assert payload(page)["layers"] == (["layer 0", "layer 1"] if isinstance(given, list) else ["a.0", "a.1"])


def test_tokens_and_title_stay_text() -> None:
    count = len(HOSTILE)
    page = plot.html(torch.rand(2, count, count), HOSTILE, title=HOSTILE[0], layer_names=HOSTILE[:1])
    reader = Reader(page)
    assert [tag for tag, _ in reader.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in reader.elements]
    assert reader.texts["title"] == reader.texts["h1"] == [HOSTILE[0]]
    assert payload(page)["query"]["tokens"] == payload(page)["key"]["tokens"] == HOSTILE
    assert payload(page)["layers"] == HOSTILE[:1]


def test_the_page_names_no_other_file() -> None:
    reader = Reader(plot.html(torch.rand(4, 4)))
    for tag, attributes in reader.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,"
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    (policy,) = [attributes["content"] for _, attributes in reader.elements if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy


def test_the_page_is_saved_and_framed(tmp_path: Path) -> None:
    page = plot.html(torch.rand(4, 4), ["a", "é", "c", "🙂"])
    assert page.save(tmp_path / "maps.html").read_text(encoding="utf-8") == page
    frame = page._repr_html_()
    assert Reader(frame).elements[0][1]["srcdoc"] == page


def test_matplotlib_is_needed_for_figures_alone() -> None:
    """In a Python where matplotlib cannot be imported."""
    code = """
import sys
sys.modules["matplotlib"] = None
import torch, torch_attn
weights = torch.rand(4, 4)
assert torch_attn.plot.html(weights).startswith("<!doctype html>")
calls = [torch_attn.plot.heatmap, torch_attn.plot.alignment, torch_attn.plot.head_grid, torch_attn.plot.feature_bars]
calls += [lambda w: torch_attn.plot.image_overlay(w, w), lambda w: torch_attn.plot.spectrogram_overlay(w, w)]
for call in calls:
    try:
        call(weights)
    except ImportError as error:
        assert "pip install matplotlib" in str(error) and "extra `plot`" in str(error)
    else:
        raise AssertionError(call)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
