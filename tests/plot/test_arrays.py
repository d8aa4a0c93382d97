"""What every picture does with its numbers first: binning, and the checks with their sentences."""

from __future__ import annotations

import pytest
import torch

from torch_attn import plot
from torch_attn.plot._arrays import Axis, bin_map

REDUCTIONS = {"mean": torch.Tensor.mean, "max": torch.Tensor.max}
SIZES = [(8, 8, 8), (64, 64, 16), (100, 100, 16), (37, 90, 10), (5, 4096, 64), (65, 64, 64), (3, 3, 1)]


@pytest.mark.parametrize("binning", REDUCTIONS)
@pytest.mark.parametrize("length, keys, max_cells", SIZES)
def test_a_cell_is_the_mean_or_the_largest_of_its_weights(length: int, keys: int, max_cells: int, binning: str) -> None:
    weights = torch.rand(2, length, keys)
    rows, columns = Axis.fit(length, max_cells), Axis.fit(keys, max_cells)
    cells = bin_map(weights, rows, columns, binning)
    assert cells.shape == (2, rows.cells, columns.cells)
    assert max(rows.cells, columns.cells) <= max_cells
    for row in range(rows.cells):
        for column in range(columns.cells):
            tops, lefts = row * rows.size, column * columns.size
            for head in range(2):
                members = weights[head, tops : tops + rows.size, lefts : lefts + columns.size]
                torch.testing.assert_close(cells[head, row, column], REDUCTIONS[binning](members))


@pytest.mark.parametrize("length, keys, max_cells", SIZES)
def test_bins_are_no_larger_than_needed(length: int, keys: int, max_cells: int) -> None:
    for tokens in (length, keys):
        size = Axis.fit(tokens, max_cells).size
        assert size == 1 or -(-tokens // (size - 1)) > max_cells


SQUARE = torch.full((4, 4), 0.25)
ERRORS = {
    "a map of heads": (lambda: plot.heatmap(SQUARE.expand(2, 4, 4)), r"weights has shape \(2, 4, 4\); .*head_grid"),
    "nan": (lambda: plot.heatmap(SQUARE * torch.nan), "weights holds negative, infinite or NaN"),
    "negative": (lambda: plot.alignment(-SQUARE), "weights holds negative"),
    "nothing": (lambda: plot.heatmap(SQUARE[:0]), r"weights has shape \(0, 4\); a picture needs"),
    "tokens": (lambda: plot.heatmap(SQUARE, ["a"]), "tokens has 1 entries, and that side of the map has 4"),
    "source": (lambda: plot.alignment(SQUARE, source=["a"]), "source has 1 entries"),
    "binning": (lambda: plot.heatmap(SQUARE, binning="sum"), "binning is 'sum'; allowed are 'mean', 'max'"),
    "style": (lambda: plot.heatmap(SQUARE, style="blue"), "style is 'blue'; allowed are 'light', 'dark'"),
    "scale": (lambda: plot.heatmap(SQUARE, color_scale="cubic"), "color_scale is 'cubic'; allowed are"),
    "vmax": (lambda: plot.heatmap(SQUARE, vmax=0), "vmax is 0; it must be above 0"),
    "max_cells": (lambda: plot.heatmap(SQUARE, max_cells=0), "max_cells is 0; it must be at least 1"),
    "layers": (lambda: plot.head_grid([SQUARE, SQUARE[:2]]), r"layers of shapes \(1, 4, 4\), \(1, 2, 4\)"),
    "page layers": (lambda: plot.html([SQUARE, SQUARE[:2]]), "make a page for each"),
    "batch": (lambda: plot.html({"a.b": SQUARE.expand(2, 3, 4, 4)}), r"the map of 'a.b' has shape \(2, 3, 4, 4\)"),
    "no maps": (lambda: plot.html({}), "weights holds no maps"),
    "image": (lambda: plot.image_overlay(torch.rand(2, 8, 8), SQUARE), r"image has shape \(2, 8, 8\)"),
    "class token": (lambda: plot.image_overlay(torch.rand(8, 8), torch.rand(17)), r"class token, weights\[1:\]"),
    "patches": (
        lambda: plot.image_overlay(torch.rand(8, 8), torch.rand(16), patch_grid=(3, 4)),
        r"weights has 16 entries; patch_grid \(3, 4\) makes 12",
    ),
    "opacity": (lambda: plot.image_overlay(torch.rand(8, 8), SQUARE, opacity=0), "opacity is 0"),
    "spectrogram": (lambda: plot.spectrogram_overlay(torch.rand(8), SQUARE), r"spectrogram has shape \(8,\)"),
    "features": (lambda: plot.feature_bars(SQUARE[0], ["a"]), "features has 1 entries"),
    "top": (lambda: plot.feature_bars(SQUARE[0], top=0), "top is 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_gets_one_sentence_that_names_the_argument(case: str) -> None:
    call, sentence = ERRORS[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_string_is_no_list_of_tokens() -> None:
    with pytest.raises(TypeError, match=r"tokens is one string; .* tokens.split\(\)"):
        plot.heatmap(SQUARE, "a b c d")
