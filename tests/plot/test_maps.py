"""heatmap, alignment and head_grid: what is on the paper is what the weights are."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from torch_attn import plot
from torch_attn.plot._colors import STYLES

from .conftest import pixel_at, render, rgb

WORDS = "the cat sat on the mat while internationalisation $x$ and $y$ a_b^c went on </b> and".split()


def maps(*shape: int) -> Tensor:
    return (2 * torch.randn(shape)).softmax(-1)


def words(count: int) -> list[str]:
    return [WORDS[place % len(WORDS)] for place in range(count)]


def labels(texts: list[Text]) -> list[str]:
    return [text.get_text() for text in texts]


def bar_of(figure: Figure) -> str:
    """The colour bar's label."""
    return figure.axes[0].child_axes[0].get_ylabel()


@pytest.mark.parametrize("style", STYLES)
def test_each_cell_of_the_png_has_the_colour_of_its_weight(style: str) -> None:
    weights = maps(5, 7)
    figure = plot.heatmap(weights, style=style)
    pixels, ax = render(figure), figure.axes[0]
    colors = plot._figure.color_map(STYLES[style], None)
    for row in range(5):
        for column in range(7):
            expected = colors(weights[row, column].item() / weights.max().item(), bytes=True)[:3]
            drawn = pixel_at(pixels, ax, column, row)
            assert max(abs(int(one) - other) for one, other in zip(expected, drawn, strict=True)) <= 1


@pytest.mark.parametrize("style", STYLES)
def test_the_background_is_the_styles(style: str, tmp_path: Path) -> None:
    for figure in (plot.heatmap(maps(4, 4), style=style), plot.head_grid(maps(2, 4, 4), style=style)):
        pixels = render(figure)
        assert tuple(pixels[0, 0]) == tuple(pixels[-1, -1]) == rgb(STYLES[style].background)


def test_binned_cells_are_means_and_lie_where_their_tokens_are() -> None:
    weights = maps(1000, 1000)
    figure = plot.heatmap(weights, max_cells=64)
    ax = figure.axes[0]
    drawn = torch.from_numpy(numpy.asarray(ax.images[0].get_array()))
    assert drawn.shape == (63, 63)
    torch.testing.assert_close(drawn[3, 5], weights[48:64, 80:96].mean())
    torch.testing.assert_close(drawn[62, 62], weights[992:, 992:].mean())
    assert ax.images[0].get_extent() == [-0.5, 1007.5, 1007.5, -0.5]
    assert ax.get_xlim() == (-0.5, 999.5) and ax.get_ylim() == (999.5, -0.5)


@pytest.mark.parametrize("binning, word", [("mean", "mean"), ("max", "largest")])
def test_a_binned_map_says_what_a_cell_stands_for(binning: str, word: str) -> None:
    ax = plot.heatmap(maps(1000, 4096), max_cells=128, binning=binning).axes[0]
    assert ax.get_xlabel() == "key (32 tokens a cell)"
    assert ax.get_ylabel() == "query (8 tokens a cell)"
    assert bar_of(ax.figure) == f"attention weight, {word} of 8 x 32"
    assert plot.heatmap(maps(70, 70), max_cells=64).axes[0].get_xlabel() == "key (2 tokens a cell)"
    assert plot.heatmap(maps(71, 71), max_cells=64).axes[0].get_xlabel() == "key (2 tokens a cell, the last 1)"


def test_an_unbinned_map_says_nothing_of_cells() -> None:
    ax = plot.heatmap(maps(64, 64)).axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel(), bar_of(ax.figure)) == ("key", "query", "attention weight")


@pytest.mark.parametrize("length", [1, 3, 16, 64])
def test_labels_are_the_tokens_and_do_not_overlap(length: int) -> None:
    tokens = words(length)
    figure = plot.heatmap(maps(length, length), tokens, title="Title")
    figure.draw_without_rendering()
    ax = figure.axes[0]
    shown = [token if len(token) <= 18 else token[:17] + "…" for token in tokens]
    for axis in (ax.xaxis, ax.yaxis):
        texts = axis.get_ticklabels()
        assert labels(texts) == shown
        assert axis.get_ticklocs().tolist() == list(range(length))
        assert min(text.get_fontsize() for text in texts) >= 5.5
    assert_apart(
        [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title]
    )


def assert_apart(texts: list[Text]) -> None:
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    for one, other in combinations(boxes, 2):
        assert not one.padded(-0.5).overlaps(other.padded(-0.5))


FIGURES = {
    "heatmap": lambda: plot.heatmap(maps(64, 64), words(64), title="Title"),
    "few tokens": lambda: plot.heatmap(maps(3, 3), words(3), title="Title"),
    "wide": lambda: plot.heatmap(maps(3, 400), key_tokens=words(400), title="Title"),
    "binned": lambda: plot.heatmap(maps(1000, 1000), title="Title", color_scale="log"),
    "alignment": lambda: plot.alignment(maps(20, 30), words(30), words(20), title="Title"),
    "grid": lambda: plot.head_grid(maps(3, 4, 20, 20), title="Title"),
    "image": lambda: plot.image_overlay(torch.rand(32, 48), maps(24), title="Title"),
    "frames": lambda: plot.spectrogram_overlay(torch.rand(40, 200), maps(50), title="Title", seconds=2.0, hertz=8000),
    "queries": lambda: plot.spectrogram_overlay(torch.rand(40, 200), maps(6, 50), words(6), title="Title"),
    "bars": lambda: plot.feature_bars(maps(5, 30), words(30), title="Title"),
}


@pytest.mark.parametrize("case", FIGURES)
def test_nothing_is_cut_off(case: str) -> None:
    figure = FIGURES[case]()
    render(figure)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


LONG = "A title of many words, which has no room in one line above a small picture like this one, $x$, but has in two"


@pytest.mark.parametrize("draw", [plot.heatmap, plot.head_grid, plot.feature_bars], ids=lambda draw: draw.__name__)
def test_a_long_title_is_broken_between_words(draw: Callable[..., Figure]) -> None:
    weights = maps(2, 4, 4) if draw is plot.head_grid else maps(4, 4)
    figure = draw(weights, title=LONG)
    render(figure)
    box = figure.get_tightbbox()
    assert box.x1 <= figure.get_size_inches()[0] and box.y1 <= figure.get_size_inches()[1]
    title = figure.get_suptitle() or figure.axes[0].get_title(loc="left")
    assert title.count("\n") > 0 and title.replace("\n", " ") == LONG


def test_where_not_all_tokens_have_room_some_are_named_in_their_places() -> None:
    tokens = [f"token{place}" for place in range(200)]
    ax = plot.heatmap(maps(200, 200), tokens).axes[0]
    ax.figure.draw_without_rendering()
    places = ax.get_yticks().astype(int).tolist()
    stride = places[1]
    assert stride > 1 and places == list(range(0, 200, stride))
    assert labels(ax.get_yticklabels()) == [tokens[place] for place in places]
    assert ax.get_ylabel() == f"query (1 token in {stride} is named)"
    assert_apart(ax.get_yticklabels())
    assert_apart(ax.get_xticklabels())


def test_white_space_is_made_visible_and_dollars_stay() -> None:
    ax = plot.heatmap(maps(4, 4), ["a\nb", " ", "$x^2$", "\t"]).axes[0]
    assert labels(ax.get_yticklabels()) == ["a↵b", "␣", "$x^2$", "⇥"]
    assert not any(text.get_parse_math() for text in [*ax.get_yticklabels(), *ax.get_xticklabels()])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [64, 4096])
def test_svg_is_xml_that_holds_the_map(length: int, style: str, tmp_path: Path) -> None:
    file = tmp_path / "map.svg"
    plot.heatmap(maps(length, length), style=style).savefig(file)
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.findall(".//{http://www.w3.org/2000/svg}image")
    assert file.stat().st_size < 1_000_000


OF_LENGTH = {
    "heatmap": lambda n, **options: plot.heatmap(maps(n, n), words(n), **options),
    "alignment": lambda n, **options: plot.alignment(maps(40, n), words(n), words(40), **options),
    "grid": lambda n, **options: plot.head_grid(maps(1, 2, 64, n), **options),
    "image": lambda n, **options: plot.image_overlay(torch.rand(128, 128), maps(n), **options),
    "frames": lambda n, **options: plot.spectrogram_overlay(torch.rand(20, n), maps(n), **options),
    "queries": lambda n, **options: plot.spectrogram_overlay(torch.rand(20, n), maps(3, n), words(3), **options),
    "bars": lambda n, **options: plot.feature_bars(maps(2, n), words(n), **options),
}


@pytest.mark.parametrize("length, style", [(64, "dark"), (4096, "light")])
@pytest.mark.parametrize("kind", OF_LENGTH)
def test_every_picture_of_few_and_of_many_tokens_is_whole_in_png_and_svg(
    kind: str, length: int, style: str, tmp_path: Path
) -> None:
    figure = OF_LENGTH[kind](length, title="Title", style=style)
    assert tuple(render(figure)[0, 0]) == rgb(STYLES[style].background)
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert max(width, height) < 16  # inches: of many tokens, too, a picture fits a page
    figure.savefig(tmp_path / "map.svg")
    assert ElementTree.parse(tmp_path / "map.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (tmp_path / "map.svg").stat().st_size < 2_000_000


@pytest.mark.parametrize("color_scale, middle", [("linear", 0.25), ("sqrt", 0.5), ("log", 0.5)])
def test_color_scales(color_scale: str, middle: float) -> None:
    weights = torch.tensor([[1.0, 0.25 if color_scale != "log" else 0.01]])
    image = plot.heatmap(weights, color_scale=color_scale).axes[0].images[0]
    assert float(image.norm(1.0)) == 1
    assert float(image.norm(weights[0, 1].item())) == pytest.approx(middle)
    assert float(image.norm(0.0)) == 0


@pytest.mark.parametrize("color_scale", ["linear", "sqrt", "log"])
@pytest.mark.parametrize("largest", [0.64, 0.97, 0.013])
def test_ticks_beyond_the_largest_weight_are_not_drawn_on_the_bar(largest: float, color_scale: str) -> None:
    figure = plot.heatmap(torch.tensor([[largest, 0.0]]), color_scale=color_scale)
    bar = figure.axes[0].child_axes[0]
    figure.draw_without_rendering()
    box = bar.get_window_extent()
    for place in bar.get_yticks():
        height = bar.transData.transform((0, place))[1]
        assert box.y0 - 1 <= height <= box.y1 + 1 or not largest / 1e4 <= place <= largest
        assert height > box.y1 or place <= largest * (1 + 1e-6)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_colours_run_in_equal_steps_of_lightness(style: object) -> None:
    """CIE L* of sRGB, IEC 61966-2-1."""
    lightness = []
    for color in plot._figure.color_map(style, None)(numpy.linspace(0, 1, 65))[:, :3]:
        linear = numpy.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        lightness.append(116 * numpy.cbrt(luminance) - 16)
    steps = numpy.diff(lightness) * (1 if style.is_dark else -1)
    assert abs(lightness[-1] - lightness[0]) > 75
    assert steps.min() > 0.7 * steps.mean() and steps.max() < 1.3 * steps.mean()


def test_axes_of_the_caller_are_drawn_on_in_the_style_of_their_figure() -> None:
    for background, ink in (("white", STYLES["light"].ink), ("#111111", STYLES["dark"].ink)):
        figure, (left, right) = pyplot.subplots(1, 2, facecolor=background)
        assert plot.heatmap(maps(8, 8), words(8), ax=left) is figure
        assert plot.alignment(maps(8, 9), ax=right) is figure
        assert len(left.images) == len(right.images) == 1
        assert {text.get_color() for text in left.get_xticklabels()} == {ink}
        assert rgb(figure.get_facecolor()) == rgb(background)
        pyplot.close(figure)


def test_pyplot_keeps_no_figure_and_a_notebook_shows_it() -> None:
    before = pyplot.get_fignums()
    figure = plot.heatmap(maps(4, 4))
    assert pyplot.get_fignums() == before
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_leading_dimensions_of_one_numpy_arrays_and_low_precision_are_taken() -> None:
    weights = maps(6, 6)
    taken = [weights[None, None], weights.numpy(), weights.tolist(), weights.double(), weights.requires_grad_()]
    for form in taken:
        assert numpy.allclose(plot.heatmap(form).axes[0].images[0].get_array(), weights.detach().numpy())
    assert plot.heatmap(weights.bfloat16()).axes[0].images[0].get_array().shape == (6, 6)


def test_alignment_has_the_source_on_top_and_frames_the_strongest() -> None:
    weights = maps(5, 8)
    source, target = words(8), list("abcde")
    ax = plot.alignment(weights, source, target).axes[0]
    assert ax.xaxis.get_ticks_position() == "top" and ax.xaxis.get_label_position() == "top"
    assert [text.get_text()[:5] for text in ax.get_xticklabels()] == [word[:5] for word in source]
    assert labels(ax.get_yticklabels()) == target
    frames = [patch.get_xy() for patch in ax.patches if isinstance(patch, Rectangle)]
    assert frames == [(column - 0.5, row - 0.5) for row, column in enumerate(weights.argmax(1).tolist())]
    assert not plot.alignment(weights, mark_strongest=False).axes[0].patches


@pytest.mark.parametrize("layers, heads, columns", [(1, 7, None), (3, 4, None), (2, 6, 3), (1, 1, None)])
def test_head_grid_shows_every_head_under_its_name(layers: int, heads: int, columns: int | None) -> None:
    weights = maps(layers, heads, 10, 10)
    figure = plot.head_grid(weights, columns=columns)
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == layers * heads
    for panel, expected in zip(panels, weights.flatten(0, 1), strict=True):
        assert numpy.allclose(panel.images[0].get_array(), expected.numpy())
        assert panel.images[0].norm.vmax == pytest.approx(weights.max().item())
    titles = [ax.get_title(loc="left") for ax in panels]
    assert titles[:heads] == [f"head {head}" for head in range(heads)]
    rows = [ax.get_ylabel() for ax in panels if ax.get_ylabel()]
    assert rows[:: 1 if columns is None else 2] == [f"layer {layer}" for layer in range(layers)] * (layers > 1)


def test_head_grid_takes_a_record_and_shortens_its_names() -> None:
    class Record:
        maps = {f"encoder.layers.{layer}.self_attn": [maps(1, 2, 5, 5), maps(1, 2, 5, 5)] for layer in range(3)}

    figure = plot.head_grid(Record())
    panels = [ax for ax in figure.axes if ax.images]
    assert [ax.get_ylabel() for ax in panels[::2]] == ["layer 0", "layer 1", "layer 2"]
    newest = Record.maps["encoder.layers.1.self_attn"][-1]
    assert numpy.allclose(panels[3].images[0].get_array(), newest[0, 1].numpy())


def test_head_grid_bins_and_divides_the_axes_of_the_caller() -> None:
    figure, (left, right) = pyplot.subplots(1, 2)
    assert plot.head_grid(maps(4, 300, 300), ax=right, max_cells=50) is figure
    panels = [ax for ax in figure.axes if ax.images]
    assert len(panels) == 4 and all(ax.images[0].get_array().shape == (50, 50) for ax in panels)
    figure.draw_without_rendering()
    assert min(ax.get_position().x0 for ax in panels) > left.get_position().x1
    assert figure.axes[-1].get_ylabel() == "attention weight, mean of 6 x 6"
    with pytest.raises(ValueError, match="ax is not part of a grid"):
        plot.head_grid(maps(2, 4, 4), ax=figure.add_axes((0, 0, 1, 1)))
    pyplot.close(figure)
