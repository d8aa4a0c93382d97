"""The picture of the demo: each measurement's attention, beside what the model misses without it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from torch import Tensor

from importance import in_a_model, rank_correlation
from panels import draw_panels
from torch_attn import plot


def draw(attention: Tensor, permutation: Tensor, names: list[str], folder: Path) -> Path:
    """Both (models, features); the order is that of the attention. What is below 0 is drawn as 0."""
    order = attention.mean(0).argsort(descending=True)
    ordered = [names[place] for place in order.tolist()]
    of_means = rank_correlation(attention.mean(0), permutation.mean(0))
    correlations = f"{of_means:.2f} of the bars, {in_a_model(attention, permutation):.2f} of one model's dots"

    def draw_both(axes: list[Axes], style: str) -> None:
        left, right = axes
        every = {"top": len(names), "sort": False, "style": style}
        title, label = (
            f"What {len(attention)} models attend (dashed: all alike)",
            "share of the class token's attention",
        )
        plot.feature_bars(attention[:, order], ordered, title=title, value_label=label, ax=left, **every)
        ink = left.xaxis.label.get_color()
        left.axvline(1 / len(names), linestyle="--", linewidth=1, color=ink)
        title, label = "What they miss when it is shuffled", "rise of the cross entropy"
        rises = permutation[:, order].clamp(min=0)
        plot.feature_bars(rises, ordered, title=title, value_label=label, ax=right, **every)
        right.set_yticklabels([])
        left.figure.suptitle(f"Rank correlation: {correlations}", color=ink, fontsize=11, x=0.01, ha="left")

    return draw_panels(draw_both, 2, (10, 7.6), folder, "importance")
