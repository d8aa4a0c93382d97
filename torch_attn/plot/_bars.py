"""feature_bars: attention over named features, such as the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import _figure
from ._arrays import check_count, to_tokens, to_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = 0.24  # inches
LONGEST = 36  # characters of a name


def feature_bars(
    weights: Any,
    features: Sequence[object] | None = None,
    *,
    top: int = 20,
    sort: bool = True,
    title: str | None = None,
    value_label: str = "attention weight",
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A bar for each feature's weight, the largest first, with its number.

    Args:
        weights: (S,); or (N, S), such as N heads or N samples: the bar is their mean, and each is a dot.
        features: the S features' names; None: "feature 0", ...
        top: draw so many; what the others weigh together is said below.
        sort: the largest first; otherwise the features' own order (of the ``top`` largest).
        title, value_label, style, ax: as in :func:`heatmap`.

    Returns:
        the figure.

    Raises:
        ValueError: a shape or value that is not allowed. ImportError: no matplotlib.
    """
    check_count(top, "top")
    values = to_weights(weights, "(S,) or (N, S)", (1, 2))
    values = values if values.dim() == 2 else values.unsqueeze(0)
    count = values.size(1)
    names = to_tokens(features, count, "features") or [f"feature {place}" for place in range(count)]
    mean = values.mean(0)
    chosen_places = mean.sort(descending=True, stable=True).indices[:top]
    places = (chosen_places if sort else chosen_places.sort().values).tolist()

    ax, style_, _ = _figure.start(ax, style, (6.0, BAR * len(places) + 1.0))
    _figure.dress(ax, style_)
    lengths = mean[places].tolist()
    lines = range(len(places))
    ax.barh(lines, lengths, height=0.72, color=style_.ramp[5], zorder=2)
    if values.size(0) > 1:
        for line, place in zip(lines, places, strict=True):
            dots = values[:, place].tolist()
            ax.scatter(dots, [line] * len(dots), s=9, color=style_.mark, alpha=0.75, linewidths=0, zorder=3)
    reach = values[:, places].max().item() or 1.0
    across = {"transform": ax.get_yaxis_transform(), "va": "center", "color": style_.ink, "fontsize": 8}
    for line, length in zip(lines, lengths, strict=True):
        ax.text(1.015, line, f"{length:#.3g}", ha="left", **across)  # beyond the grid, which would cross it out
    ax.set(xlim=(0, 1.04 * reach), ylim=(len(places) - 0.5, -0.5))
    ax.xaxis.grid(True, color=style_.grid, linewidth=0.6, zorder=0)
    ax.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)
    rest = mean.sum().item() - sum(lengths)
    label = value_label if values.size(0) == 1 else f"{value_label}: mean of {values.size(0)} (dots: each)"
    if count > len(places):
        label += f"\nthe other {count - len(places)} features: {rest:.3g} together"
    ax.set_xlabel(label).set_parse_math(False)
    _figure.write_title(ax, title, style_)
    drawn = [names[place] for place in places]
    ax.yaxis.set_tick_params(length=0)
    _figure.fit_tokens(ax, drawn, None, style_, LONGEST)
    return ax.figure
