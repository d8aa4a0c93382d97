"""The pictures of docs/semantics.md, for make_figures.py: which keys each mask shows, and error by length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import torch_attn
from torch_attn import reference
from torch_attn.plot._colors import STYLES, Style

ROWS, KEYS = 6, 10
MASKS = {
    "is_causal=True": {"is_causal": True},
    'is_causal=True,\ncausal_alignment="bottom_right"': {"is_causal": True, "causal_alignment": "bottom_right"},
    "is_causal=True,\nwindow_left=2": {"is_causal": True, "window_left": 2},
    'window_left=2, window_right=1,\ncausal_alignment="bottom_right"': {
        "window_left": 2,
        "window_right": 1,
        "causal_alignment": "bottom_right",
    },
    "key_lengths=7": {"key_lengths": torch.tensor([7])},
    'is_causal=True, key_lengths=7,\ncausal_alignment="bottom_right"': {
        "is_causal": True,
        "key_lengths": torch.tensor([7]),
        "causal_alignment": "bottom_right",
    },
}
LENGTHS = [64, 256, 1024, 4096]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def new_figure(style: Style, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, facecolor=style.background, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(ax, style: Style, title: str) -> None:
    ax.set_facecolor(style.background)
    ax.set_title(title, color=style.ink, fontsize=9)
    ax.tick_params(colors=style.muted, labelsize=8)
    for spine in ax.spines.values():
        spine.set_color(style.grid)
    ax.xaxis.label.set_color(style.muted)
    ax.yaxis.label.set_color(style.muted)


def masks(name: str) -> Figure:
    """The attended keys of six masks, for 6 rows and 10 keys."""
    style = STYLES[name]
    figure = new_figure(style, (9, 5))
    for ax, (title, options) in zip(figure.subplots(2, 3).flat, MASKS.items(), strict=True):
        visible = reference.band_mask(ROWS, KEYS, **options)[0, 0]
        shown = [[style.ramp[5] if cell else style.panel for cell in row] for row in visible.tolist()]
        for i, row in enumerate(shown):
            for j, color in enumerate(row):
                ax.add_patch(Rectangle((j + 0.06, i + 0.06), 0.88, 0.88, color=color))
        ax.set(xlim=(0, KEYS), ylim=(ROWS, 0), aspect="equal", xlabel="key", ylabel="query row")
        ax.set_xticks([j + 0.5 for j in range(KEYS)], range(KEYS))
        ax.set_yticks([i + 0.5 for i in range(ROWS)], range(ROWS))
        dress(ax, style, title)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure


def passes(attention, inputs: list[Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    names = ("grad_query", "grad_key", "grad_value")
    return {
        "output": out.detach(),
        **dict(zip(names, torch.autograd.grad(out, leaves, grad_out), strict=True)),
    }


def errors_by_length() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By dtype and result: the relative RMS error of ours and of PyTorch's at each of LENGTHS."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, dtype in DTYPES.items():
        for length in LENGTHS:
            *inputs, grad_out = (torch.randn(1, 2, length, 64).to(dtype) for _ in range(4))
            doubled = [x.double() for x in inputs]
            exact = passes(F.scaled_dot_product_attention, doubled, grad_out.double())
            ours = passes(torch_attn.scaled_dot_product_attention, inputs, grad_out)
            torchs = passes(F.scaled_dot_product_attention, inputs, grad_out)
            for result, right in exact.items():
                relative = [((x[result].double() - right).norm() / right.norm()).item() for x in (ours, torchs)]
                found.setdefault(name, {}).setdefault(result, []).append((relative[0], relative[1]))
    return found


def numerics(name: str, errors: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    style = STYLES[name]
    figure = new_figure(style, (9, 3.4))
    for ax, (result, title) in zip(
        figure.subplots(1, 3, sharey=True),
        {"output": "Output", "grad_query": "Gradient of query", "grad_value": "Gradient of value"}.items(),
        strict=True,
    ):
        for dtype, color in zip(DTYPES, (style.ramp[8], style.ramp[5], style.mark), strict=True):
            ours, torchs = zip(*errors[dtype][result], strict=True)
            ax.plot(LENGTHS, ours, color=color, marker="o", markersize=4, label=f"{dtype}, torch_attn")
            ax.plot(LENGTHS, torchs, color=color, linestyle="--", marker="x", markersize=4, label=f"{dtype}, PyTorch")
        ax.set(xscale="log", yscale="log", xlabel="length")
        ax.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
        ax.minorticks_off()
        ax.grid(color=style.grid, linewidth=0.6)
        dress(ax, style, title)
    figure.axes[0].set_ylabel("relative error (RMS)")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
        labelcolor=style.ink,
    )
    return figure
