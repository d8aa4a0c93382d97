"""One headless Chromium for all tests of the page, and a look at what matplotlib has drawn."""

from __future__ import annotations

import io
from collections.abc import Iterator

import matplotlib
import numpy
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from .chromium import PATH, Chromium

matplotlib.use("Agg")


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if PATH is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    chromium = Chromium()
    yield chromium
    chromium.close()


def render(figure: Figure) -> numpy.ndarray:
    """The figure as a PNG's pixels, (height, width, 3) of bytes, a pixel of the figure's own dpi each."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    buffer.seek(0)
    return (imread(buffer)[..., :3] * 255).round().astype(int)


def pixel_at(pixels: numpy.ndarray, ax: matplotlib.axes.Axes, x: float, y: float) -> tuple[int, int, int]:
    """The colour of the pixel that shows the point (x, y) of the axes' data; call after `render`."""
    across, up = ax.transData.transform((x, y))
    return tuple(pixels[pixels.shape[0] - 1 - int(up), int(across)].tolist())


def rgb(color: str) -> tuple[int, int, int]:
    return tuple(round(255 * channel) for channel in matplotlib.colors.to_rgb(color))
