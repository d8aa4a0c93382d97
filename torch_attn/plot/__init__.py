"""Pictures of attention: figures with matplotlib (the extra ``plot``), and an HTML page that needs nothing.

>>> from torch_attn import plot
>>> plot.heatmap(weights, tokens).savefig("map.png")
>>> plot.html(weights, tokens).save("maps.html")

The functions take maps, and do not care where they come from; docs/maps.md shows each picture with its code.
"""

from ._bars import feature_bars
from ._html import Page, html
from ._maps import alignment, head_grid, heatmap
from ._overlays import image_overlay, spectrogram_overlay

__all__ = [
    "Page",
    "alignment",
    "feature_bars",
    "head_grid",
    "heatmap",
    "html",
    "image_overlay",
    "spectrogram_overlay",
]
