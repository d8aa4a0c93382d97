"""The picture of the demo: each measurement's attention, beside what the model misses without it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from torch import Tensor

from torch_attn import plot

matplotlib.use("Agg")  # draws into a file, so no screen is needed
from matplotlib import pyplot  # noqa: E402

BACKGROUND = {"light": "#ffffff", "dark": "#10131a"}


def draw(attention: Tensor, permutation: Tensor, names: list[str], file: Path, style: str = "light") -> None:
    """Both (folds, features); the order is that of the attention."""
    order = attention.mean(0).argsort(descending=True)
    names = [names[place] for place in order.tolist()]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 7.6), layout="constrained", facecolor=BACKGROUND[style], dpi=100
    )
    every = {"top": len(names), "sort": False, "style": style}
    plot.feature_bars(
        attention[:, order],
        names,
        title="What the model attends",
        value_label="share of the attention",
        ax=left,
        **every,
    )
    plot.feature_bars(
        permutation[:, order].clamp(min=0),
        names,
        title="What it misses when shuffled",
        value_label="rise of the cross entropy",
        ax=right,
        **every,
    )
    right.set_yticklabels([])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
