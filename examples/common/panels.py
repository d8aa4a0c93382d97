"""Pictures of several panels side by side, in the two styles that the documents show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BACKGROUNDS = {"light": "#ffffff", "dark": "#10131a"}  # torch_attn.plot's


def draw_panels(
    draw: Callable[[list[Axes], str], None], count: int, size: tuple[float, float], folder: Path, name: str
) -> Path:
    """Have ``draw(axes, style)`` fill ``count`` panels, for each style anew. Returns the files' names, as a pattern.

    ``size``: inches of the whole. Written are ``name``_light.png and ``name``_dark.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for style, background in BACKGROUNDS.items():
        figure = Figure(figsize=size, layout="constrained", facecolor=background, dpi=100)
        draw(figure.subplots(1, count, squeeze=False)[0].tolist(), style)
        figure.savefig(folder / f"{name}_{style}.png")
    return folder / f"{name}_*.png"
