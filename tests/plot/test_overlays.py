"""image_overlay, spectrogram_overlay and feature_bars: what is attended lights up, in its place."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from torch_attn import plot
from torch_attn.plot._colors import STYLES

from .conftest import pixel_at, render, rgb


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("height, width, rows, columns", [(8, 8, 4, 4), (12, 30, 2, 5), (9, 6, 3, 2)])
def test_the_glow_lies_on_the_attended_patch_alone(
    height: int, width: int, rows: int, columns: int, style: str
) -> None:
    for patch in torch.randint(rows * columns, (2,)).tolist():
        weights = torch.zeros(rows * columns)
        weights[patch] = 1
        figure = plot.image_overlay(torch.zeros(height, width), weights, style=style, opacity=1, show_grid=False)
        pixels, ax = render(figure), figure.axes[0]
        grey = 0 if style == "dark" else round(0.3 * 255)
        for y in range(height):
            for x in range(width):
                lit = (y * rows // height, x * columns // width) == divmod(patch, columns)
                expected = rgb(STYLES[style].mark) if lit else (grey, grey, grey)
                drawn = pixel_at(pixels, ax, x, y)
                assert max(abs(one - other) for one, other in zip(drawn, expected, strict=True)) <= 2, (x, y)


def test_patches_borders_lie_between_the_patches() -> None:
    ax = plot.image_overlay(torch.rand(12, 30), torch.rand(2, 5)).axes[0]
    across, down = (lines.get_segments() for lines in ax.collections)
    assert [segment[0][1] for segment in across] == [5.5]
    assert [segment[0][0] for segment in down] == [5.5, 11.5, 17.5, 23.5]


def test_images_of_every_layout_look_the_same() -> None:
    image = torch.randint(256, (6, 9), dtype=torch.uint8)
    colour = image.expand(3, 6, 9)
    forms = [image, image[None], image[..., None], image.numpy(), image.float() / 255, colour, colour.movedim(0, -1)]
    drawn = [plot.image_overlay(form, torch.rand(2, 3)).axes[0].images[0].get_array() for form in forms]
    for one in drawn[1:]:
        assert numpy.allclose(one, drawn[0], atol=1e-6)


def test_floats_beyond_0_to_1_are_stretched() -> None:
    image = torch.tensor([[-3.0, 5.0], [1.0, 5.0]])
    drawn = plot.image_overlay(image, torch.rand(1), style="dark").axes[0].images[0].get_array()
    assert numpy.allclose(drawn, [[0, 0.7], [0.35, 0.7]])


def curve(weights: Tensor, **options: object) -> tuple:
    figure = plot.spectrogram_overlay(torch.rand(16, 120), weights, **options)
    ax = figure.axes[0]
    strip = next(child for child in ax.child_axes if child.patches or child.images)
    return figure, ax, strip


@pytest.mark.parametrize("frames", [120, 30, 7])
def test_each_frame_covers_its_share_of_the_time(frames: int) -> None:
    weights = torch.rand(frames)
    figure, ax, strip = curve(weights, seconds=3.0, hertz=4000.0)
    steps = strip.patches[0].get_data()
    assert numpy.allclose(steps.values, weights.numpy())
    assert numpy.allclose(steps.edges, numpy.linspace(0, 3, frames + 1))
    glow = ax.images[1]
    assert numpy.allclose(glow.get_array(), weights.numpy()[None]) and glow.get_extent() == [0, 3, 0, 4000]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "frequency (Hz)")


@pytest.mark.parametrize("weights", [torch.rand(30), torch.rand(4, 30)], ids=["curve", "map"])
def test_the_strip_stands_right_above_the_spectrogram(weights: Tensor) -> None:
    figure, ax, strip = curve(weights)
    render(figure)
    below, above = ax.get_window_extent(), strip.get_window_extent()
    assert above.x0 == pytest.approx(below.x0, abs=0.5) and above.x1 == pytest.approx(below.x1, abs=0.5)
    assert above.y0 > below.y1
    assert strip.get_xlim() == ax.get_xlim() == (0, 120)


def test_several_queries_make_a_map_with_their_names() -> None:
    weights = torch.rand(3, 40)
    figure, ax, strip = curve(weights, tokens=["first", "second", "third"])
    assert numpy.allclose(strip.images[0].get_array(), weights.numpy())
    assert strip.images[0].get_extent() == [0, 120, 2.5, -0.5]
    assert [text.get_text() for text in strip.get_yticklabels()] == ["first", "second", "third"]


def test_thousands_of_frames_are_binned_and_it_says_so() -> None:
    weights = torch.rand(4096)
    figure, ax, strip = curve(weights, max_cells=512)
    assert numpy.allclose(strip.patches[0].get_data().values, weights.view(512, 8).mean(1).numpy(), atol=1e-6)
    assert ax.get_xlabel() == "spectrogram column; weights: 8 frames a cell"


def bars(weights: Tensor, **options: object) -> tuple[list[str], list[float], list[str], str]:
    ax = plot.feature_bars(weights, **options).axes[0]
    names = [text.get_text() for text in ax.get_yticklabels()]
    return names, [bar.get_width() for bar in ax.patches], [text.get_text() for text in ax.texts], ax.get_xlabel()


def test_bars_stand_in_order_with_their_numbers() -> None:
    names, lengths, numbers, label = bars(torch.tensor([0.1, 0.55, 0.05, 0.3]), features=["a", "b", "c", "$d$"])
    assert names == ["b", "$d$", "a", "c"]
    assert lengths == pytest.approx([0.55, 0.3, 0.1, 0.05])
    assert numbers == ["0.550", "0.300", "0.100", "0.0500"]
    assert label == "attention weight"
    assert bars(torch.tensor([0.1, 0.6, 0.3]), sort=False)[0] == ["feature 0", "feature 1", "feature 2"]


def test_numbers_stand_beside_the_grid() -> None:
    ax = plot.feature_bars(torch.rand(3, 8)).axes[0]
    ax.figure.draw_without_rendering()
    right = ax.get_window_extent().x1
    assert all(text.get_window_extent().x0 > right for text in ax.texts)


def test_of_many_features_the_largest_are_drawn_and_the_rest_summed() -> None:
    weights = torch.randn(4096).softmax(0)
    names, lengths, _, label = bars(weights, top=5)
    values, places = weights.topk(5)
    assert names == [f"feature {place}" for place in places.tolist()]
    assert lengths == pytest.approx(values.tolist())
    assert label == f"attention weight\nthe other 4091 features: {1 - values.sum().item():.3g} together"


def test_bars_of_several_heads_are_means_with_a_dot_each() -> None:
    weights = torch.rand(4, 3)
    ax = plot.feature_bars(weights, sort=False).axes[0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(weights.mean(0).tolist())
    for place, dots in enumerate(ax.collections):
        assert numpy.allclose(dots.get_offsets(), [(weight, place) for weight in weights[:, place].tolist()])
    assert ax.get_xlabel() == "attention weight: mean of 4 (dots: each)"
