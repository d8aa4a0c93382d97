"""The HTML page in headless Chromium: what it shows, what it answers, and that it asks the network for nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torch_attn import plot
from torch_attn.plot._colors import STYLES

from .chromium import Chromium
from .conftest import rgb
from .test_html import HOSTILE

LENGTH = 64
TOKENS = [f"token{place}" for place in range(LENGTH - len(HOSTILE))] + HOSTILE


@pytest.fixture(scope="module")
def weights() -> Tensor:
    """(4 layers, 8 heads, 64, 64)"""
    return (3 * torch.randn(4, 8, LENGTH, LENGTH)).softmax(-1)


@pytest.fixture(scope="module")
def file(weights: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plot.html(weights, TOKENS, title="Maps").save(tmp_path_factory.mktemp("page") / "maps.html")


@pytest.fixture
def page(browser: Chromium, file: Path) -> Iterator[Chromium]:
    """The page, opened; whatever a test does with it, it must not complain, nor ask for anything but itself."""
    browser.hover(0, 0)
    browser.open(file)
    yield browser
    assert browser.complaints == []
    assert browser.requests == [file.resolve().as_uri()]


def ranking(page: Chromium) -> list[float]:
    script = "[...document.querySelectorAll('#ranking .number')].map((entry) => entry.textContent)"
    return [float(number) for number in page.evaluate(script)]


def chosen_weight(page: Chromium) -> float:
    return float(page.text("#readout strong"))


def close_to(weight: Tensor, row: Tensor) -> object:
    """Within what the storage in 8 bits and three printed digits allow."""
    return pytest.approx(weight.item(), abs=0.0021 * row.max().item() + 0.0051 * weight.item())


def point_at_cell(page: Chromium, query: int, key: int, cells: int = LENGTH) -> None:
    """Move the mouse to a cell; the page says where on its canvas the map lies."""
    script = """(() => {
        const canvas = document.getElementById("map");
        canvas.scrollIntoView({ block: "center" });
        const box = canvas.getBoundingClientRect(), { left, top, width, height } = canvas.dataset;
        return [box.x + Number(left), box.y + Number(top), Number(width), Number(height)];
    })()"""
    left, top, width, height = page.evaluate(script)
    page.hover(left + (key + 0.5) * width / cells, top + (query + 0.5) * height / cells)


def test_pointing_at_a_query_shows_where_it_attends(page: Chromium, weights: Tensor) -> None:
    seen = []
    for query in (3, 40):
        page.hover(*page.center(f"#query-{query}"))
        row = weights[0, 0, query]
        assert f"query {query} “{TOKENS[query]}”" in page.text("#readout")
        assert ranking(page) == [close_to(weight, row) for weight in row.sort(descending=True).values[:8]]
        seen.append(page.text("#ranking"))
    assert seen[0] != seen[1]


def test_pointing_at_a_key_shows_what_attends_to_it(page: Chromium, weights: Tensor) -> None:
    page.hover(*page.center("#key-7"))
    column, rows = weights[0, 0, :, 7], weights[0, 0].amax(1)
    assert "key 7 “token7” is attended most by" in page.text("#ranking-name")
    order = column.sort(descending=True)
    assert ranking(page) == [
        pytest.approx(weight, abs=0.0021 * rows.max().item() + 0.0051 * weight) for weight in order.values[:8].tolist()
    ]


@pytest.mark.parametrize("query, key", [(0, 0), (5, 50), (63, 63)])
def test_pointing_at_a_cell_shows_its_weight(page: Chromium, weights: Tensor, query: int, key: int) -> None:
    point_at_cell(page, query, key)
    text = page.text("#readout")
    assert f"query {query} “" in text and f"→ key {key} “" in text
    assert chosen_weight(page) == close_to(weights[0, 0, query, key], weights[0, 0, query])
    page.hover(1, 1)
    assert "point at a cell" in page.text("#readout")


def test_layer_and_head_are_chosen_by_mouse(page: Chromium, weights: Tensor) -> None:
    choose = "const layer = document.getElementById('layer'); layer.value = 2; layer.dispatchEvent(new Event('change'))"
    page.evaluate(f"(() => {{ {choose} }})()")
    page.click(*page.center('#heads [data-head="5"]'))
    point_at_cell(page, 9, 10)
    assert page.text("#readout").startswith("layer 2, head 5: query 9")
    assert chosen_weight(page) == close_to(weights[2, 5, 9, 10], weights[2, 5, 9])


def test_the_mean_of_the_heads_can_be_chosen(page: Chromium, weights: Tensor) -> None:
    page.click(*page.center('#heads [data-head="-1"]'))
    page.hover(*page.center("#query-12"))
    expected = weights[0, :, 12].mean(0).sort(descending=True).values[:8].tolist()
    largest = weights[0, :, 12].amax(1).mean().item()
    assert ranking(page) == [pytest.approx(weight, abs=0.0021 * largest + 0.0051 * weight) for weight in expected]
    assert "mean of heads" in page.text("#readout")


def test_all_of_it_can_be_reached_and_used_by_keyboard(page: Chromium, weights: Tensor) -> None:
    reached = []
    for _ in range(6):
        page.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.dataset.head"))
    assert reached == ["layer", "scale", "0", "map", "queries", "keys"]

    page.evaluate("document.querySelector('#heads [tabindex=\"0\"]').focus()")
    page.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.head") == "1"
    assert page.evaluate("document.activeElement.getAttribute('aria-checked')") == "true"

    page.evaluate("document.getElementById('map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.press(key)
    assert "layer 0, head 1: query 1 “token1” → key 1 “token1”" in page.text("#readout")
    assert chosen_weight(page) == close_to(weights[0, 1, 1, 1], weights[0, 1, 1])

    page.press("Escape")
    page.evaluate("document.getElementById('queries').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        page.press(key)
    assert "query 2 “token2” attends most to" in page.text("#ranking-name")
    assert page.evaluate("document.getElementById('query-2').getAttribute('aria-selected')") == "true"
    assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == "query-2"


def test_a_click_holds_the_choice_until_escape(page: Chromium) -> None:
    page.click(*page.center("#query-4"))
    page.hover(*page.center("#query-9"))
    assert "query 4 “" in page.text("#readout")
    page.press("Escape")
    page.hover(*page.center("#query-10"))
    assert "query 10 “" in page.text("#readout")


def test_attended_tokens_are_shaded_by_their_weights(page: Chromium, weights: Tensor) -> None:
    row = weights[0, 0, 20]
    page.hover(*page.center("#query-20"))
    ramp = plot._figure.color_map(STYLES["light"], None)
    for key in (row.argmax().item(), row.argmin().item(), 33):
        style = f"getComputedStyle(document.getElementById('key-{key}')).backgroundColor"
        drawn = [float(channel) for channel in re.findall(r"[\d.]+", page.evaluate(style))[:3]]
        expected = ramp(row[key].item() / weights[0, 0].max().item(), bytes=True)[:3]
        assert drawn == pytest.approx([int(channel) for channel in expected], abs=4)


@pytest.mark.parametrize("style", STYLES)
def test_light_or_dark_as_the_system_is(page: Chromium, style: str) -> None:
    page.color_scheme(style)
    page.draw()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert tuple(map(int, re.findall(r"\d+", background)))[:3] == rgb(STYLES[style].background)
    lowest = page.evaluate("[...document.getElementById('legend').getContext('2d').getImageData(0, 0, 1, 1).data]")
    assert tuple(lowest[:3]) == rgb(STYLES[style].ramp[0])


def test_hostile_tokens_are_shown_and_not_run(page: Chromium) -> None:
    shown = page.evaluate("[...document.querySelectorAll('#queries .token')].map((token) => token.textContent)")
    assert shown[: len(TOKENS) - 1] == [token if token.strip() else "␣" for token in TOKENS[:-1]]
    assert shown[-1] == "↵"
    page.hover(*page.center(f"#query-{TOKENS.index(HOSTILE[0])}"))
    assert HOSTILE[0] in page.text("#readout")
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.images.length") == 0


def test_the_browser_is_told_to_refuse_every_connection(browser: Chromium, file: Path) -> None:
    browser.open(file)
    script = """new Promise((resolve) => {
        addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
        fetch("https://example.com/").catch(() => {});
    })"""
    assert browser.evaluate(script) == "connect-src"


def test_a_binned_page_shows_ranges_and_their_tokens(browser: Chromium, tmp_path: Path) -> None:
    weights = torch.rand(1, 2, 4096, 4096)
    words = [f"w{place}" for place in range(4096)]
    file = plot.html(weights, words, max_cells=64).save(tmp_path / "large.html")
    browser.open(file)
    point_at_cell(browser, 2, 63)
    text = browser.text("#readout")
    assert "query 128–191 “w128 w129" in text and "→ key 4032–4095 “w4032" in text
    assert "mean weight of the cell" in text
    expected = weights[0, 0, 128:192, 4032:].mean().item()
    assert chosen_weight(browser) == pytest.approx(expected, rel=0.01)
    assert browser.complaints == []


def test_the_page_fits_a_narrow_screen(browser: Chromium, file: Path) -> None:
    size = {"height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", width=420, **size)
    try:
        browser.open(file)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 420
        point_at_cell(browser, 30, 30)
        assert "query 30" in browser.text("#readout")
    finally:
        browser.call("Emulation.setDeviceMetricsOverride", width=1280, **{**size, "height": 1100})
