"""Pictures of whole maps: heatmap (token x token), head_grid (many at once), alignment (source x target)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _figure
from ._arrays import BINNINGS, Axis, bin_map, check_choice, check_count, to_layers, to_tokens, to_weights
from ._colors import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.text import Text

SMALLEST_SIDE, LARGEST_SIDE = 2.2, 8.0  # inches of a map
CELL = 0.26  # inches that a labelled cell would like to have; 64 of them share LARGEST_SIDE


def heatmap(
    weights: Any,
    tokens: Sequence[object] | None = None,
    *,
    key_tokens: Sequence[object] | None = None,
    title: str | None = None,
    query_label: str = "query",
    key_label: str = "key",
    value_label: str = "attention weight",
    max_cells: int = 256,
    binning: str = "mean",
    color_scale: str = "linear",
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """One attention map: a row for each query, a column for each key.

    Args:
        weights: (L, S), or with leading dimensions of 1; a tensor or array of finite values, none below 0.
        tokens: the L queries' names; also the keys', where ``key_tokens`` is None and L equals S.
        key_tokens: the S keys' names.
        title, query_label, key_label, value_label: texts. No text is read as mathematics, so ``$`` is a dollar sign.
        max_cells: a map with more rows or columns is binned: each cell stands for the least number of tokens a side
            that fits, and the axis says how many.
        binning: what a cell shows of its weights, ``"mean"`` (keeps proportions) or ``"max"`` (keeps thin lines).
        color_scale: ``"linear"``, ``"sqrt"`` or ``"log"`` (four decades); the latter two lift small weights.
        vmax: the weight with the colour scale's last colour; None: the largest that is drawn.
        cmap: a matplotlib colour map instead of the style's own, which runs in equal steps of lightness.
        style: ``"light"`` or ``"dark"``; None: light, or what suits the background of the figure of ``ax``.
        ax: matplotlib axes to draw on; None: a new figure.

    Returns:
        the figure; ``figure.savefig("map.svg")`` or ``.png`` writes it, and a notebook shows it.

    Raises:
        ValueError: a shape, value or choice that is not allowed. ImportError: no matplotlib.
    """
    values = to_weights(weights, "(L, S), one map: choose a head, or call head_grid", (2,))
    rows, columns = _axes_of(values, max_cells, binning)
    query_names = to_tokens(tokens, rows.length, "tokens")
    if key_tokens is None and rows.length == columns.length:
        key_tokens = tokens
    key_names = to_tokens(key_tokens, columns.length, "key_tokens")

    ax, chosen, _ = _figure.start(ax, style, _size(rows, columns))
    cells = bin_map(values, rows, columns, binning)
    norm = _figure.color_norm(color_scale, vmax, cells.max().item())
    image = _draw(ax, cells, rows, columns, norm, chosen, cmap)
    _figure.label_axis(ax.xaxis, columns, key_names, key_label, chosen)
    _figure.label_axis(ax.yaxis, rows, query_names, query_label, chosen)
    _figure.write_title(ax, title, chosen)
    bar_label = _figure.value_label(value_label, rows, columns, binning)
    _figure.color_bar(ax, image, bar_label, chosen, _extend(norm, cells))
    _fit(ax, rows, columns, query_names, key_names, chosen)
    return ax.figure


def alignment(
    weights: Any,
    source: Sequence[object] | None = None,
    target: Sequence[object] | None = None,
    *,
    title: str | None = None,
    mark_strongest: bool = True,
    source_label: str = "source",
    target_label: str = "target",
    value_label: str = "attention weight",
    max_cells: int = 256,
    binning: str = "mean",
    color_scale: str = "linear",
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Where each target token looks in the source, as in Bahdanau et al. 2015, figure 3: the source runs along the top.

    Args:
        weights: (L, S): L target tokens (queries) by S source tokens (keys).
        source, target: names of the S source and of the L target tokens.
        mark_strongest: frame each target token's largest weight, where the map is not binned.
        others: as in :func:`heatmap`.

    Returns:
        the figure.

    Raises:
        ValueError: a shape, value or choice that is not allowed. ImportError: no matplotlib.
    """
    values = to_weights(weights, "(L, S), target by source", (2,))
    rows, columns = _axes_of(values, max_cells, binning)
    target_names = to_tokens(target, rows.length, "target")
    source_names = to_tokens(source, columns.length, "source")

    ax, chosen, _ = _figure.start(ax, style, _size(rows, columns))
    cells = bin_map(values, rows, columns, binning)
    norm = _figure.color_norm(color_scale, vmax, cells.max().item())
    image = _draw(ax, cells, rows, columns, norm, chosen, cmap)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    _figure.label_axis(ax.xaxis, columns, source_names, source_label, chosen)
    _figure.label_axis(ax.yaxis, rows, target_names, target_label, chosen)
    if mark_strongest and rows.size == columns.size == 1:
        _frame_strongest(ax, values, chosen)
    _figure.write_title(ax, title, chosen)
    bar_label = _figure.value_label(value_label, rows, columns, binning)
    _figure.color_bar(ax, image, bar_label, chosen, _extend(norm, cells))
    _fit(ax, rows, columns, target_names, source_names, chosen)
    return ax.figure


def head_grid(
    weights: Any,
    *,
    columns: int | None = None,
    layer_names: Sequence[object] | None = None,
    head_names: Sequence[object] | None = None,
    title: str | None = None,
    query_label: str = "query",
    key_label: str = "key",
    value_label: str = "attention weight",
    max_cells: int = 96,
    binning: str = "mean",
    color_scale: str = "sqrt",
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Many maps side by side, with one colour scale, to see at a glance what each head does.

    Args:
        weights: (heads, L, S), or (layers, heads, L, S) for a row of maps a layer; or what
            :func:`torch_attn.record_attention` recorded, or a sequence or mapping of one (heads, L, S) a layer.
        columns: how many maps a row; None: all heads of a layer, or for a single layer what is nearest a square.
        layer_names, head_names: one name each; None: the record's names or "layer 0", ..., and "head 0", ...
        others: as in :func:`heatmap`; an ``ax`` must stem from a grid (``pyplot.subplots``), which is divided further.

    Returns:
        the figure.

    Raises:
        ValueError: a shape, value or choice that is not allowed. ImportError: no matplotlib.
    """
    names, maps = to_layers(weights)
    if len({layer.shape for layer in maps}) > 1:
        shapes = ", ".join(str(tuple(layer.shape)) for layer in maps)
        raise ValueError(f"weights has layers of shapes {shapes}; head_grid draws layers of one shape: choose some.")
    layers, heads = len(maps), maps[0].size(0)
    across = columns if columns is not None else (heads if layers > 1 else math.ceil(math.sqrt(heads)))
    check_count(across, "columns")
    down_a_layer = -(-heads // across)
    layer_texts = to_tokens(layer_names, layers, "layer_names") or _short_names(names)
    head_texts = to_tokens(head_names, heads, "head_names") or [f"head {head}" for head in range(heads)]
    rows, cols = _axes_of(maps[0], max_cells, binning)

    panel = min(1.9, max(0.9, 9.0 / across))
    ratio = min(2.0, max(0.5, rows.length / cols.length))
    # The colour bar's label, which stands beside all maps together, needs 2.8 inches.
    size = (max(3.6, across * panel + 1.3), max(2.8, layers * down_a_layer * (panel * ratio + 0.08) + 0.7))
    panels, chosen, figure = _panels(ax, style, size, layers * down_a_layer, across)
    cells = torch.stack([bin_map(layer, rows, cols, binning) for layer in maps])
    norm = _figure.color_norm(color_scale, vmax, cells.max().item())
    for place, axis in enumerate(panels.flat):
        row, column = divmod(place, across)
        layer, head = row // down_a_layer, row % down_a_layer * across + column
        if head >= heads:
            axis.set_axis_off()
            continue
        image = _draw(axis, cells[layer, head], rows, cols, norm, chosen, cmap)
        axis.set(xticks=[], yticks=[])
        if row == 0 or down_a_layer > 1:
            _write_small(axis.set_title, head_texts[head], chosen, loc="left", pad=3)
        if column == 0 and layers > 1:
            _write_small(axis.set_ylabel, layer_texts[layer], chosen)
    if ax is None:
        note = f"in each map a row is a {query_label}, a column a {key_label}"
        figure.supxlabel(note, x=0.01, ha="left", color=chosen.muted, fontsize=8, parse_math=False)
    if title and ax is None:
        font = {"fontsize": 11, "fontweight": "bold", "parse_math": False}
        _figure.wrap(figure.suptitle(title, x=0.01, ha="left", color=chosen.ink, **font), margin=0.2)
    elif title:
        _figure.write_title(ax, title, chosen)
    bar = figure.colorbar(
        image, ax=panels.ravel().tolist(), fraction=0.03, pad=0.02, aspect=30, extend=_extend(norm, cells)
    )
    _figure.dress_bar(bar, _figure.value_label(value_label, rows, cols, binning), chosen)
    _figure.settle(figure)
    return figure


def _short_names(names: list[str]) -> list[str]:
    """Without the parts that all names share: "encoder.layers.0.self_attn" becomes "layer 0"."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    short = [".".join(part) for part in parts]
    return [_figure.printable(f"layer {name}" if name.isdecimal() else name) for name in short]


def _axes_of(values: Tensor, max_cells: int, binning: str) -> tuple[Axis, Axis]:
    check_count(max_cells, "max_cells")
    check_choice(binning, "binning", BINNINGS)
    return Axis.fit(values.size(-2), max_cells), Axis.fit(values.size(-1), max_cells)


def _size(rows: Axis, columns: Axis) -> tuple[float, float]:
    """Inches of a figure that gives labelled cells their room, and maps of thousands a readable square."""
    height, width = (min(LARGEST_SIDE, max(SMALLEST_SIDE, CELL * side.length)) for side in (rows, columns))
    if _square_cells(rows, columns):
        cell = min(width / columns.length, height / rows.length)
        height, width = max(1.0, cell * rows.length), max(1.0, cell * columns.length)
    if rows.size > 1 or columns.size > 1:
        height, width = 0.75 * height, 0.75 * width
    return width + 1.9, height + 1.1


def _square_cells(rows: Axis, columns: Axis) -> bool:
    return 1 / 3 <= rows.length / columns.length <= 3


def _draw(
    ax: Axes, cells: Tensor, rows: Axis, columns: Axis, norm: Normalize, style: Style, cmap: str | Colormap | None
) -> AxesImage:
    """The map in coordinates of tokens: token t lies around t, whatever the cells' size."""
    _figure.dress(ax, style)
    extent = (-0.5, columns.cells * columns.size - 0.5, rows.cells * rows.size - 0.5, -0.5)
    aspect = "equal" if _square_cells(rows, columns) else "auto"
    image = ax.imshow(
        cells.numpy(),
        cmap=_figure.color_map(style, cmap),
        norm=norm,
        extent=extent,
        aspect=aspect,
        interpolation="none",
    )
    ax.set(xlim=(-0.5, columns.length - 0.5), ylim=(rows.length - 0.5, -0.5))  # cuts what a last cell lacks
    return image


def _extend(norm: Normalize, cells: Tensor) -> str:
    from matplotlib.colors import LogNorm

    above = norm.vmax < cells.max().item()
    below = isinstance(norm, LogNorm) and norm.vmin > cells.min().item()
    return {(True, True): "both", (True, False): "max", (False, True): "min"}.get((above, below), "neither")


def _frame_strongest(ax: Axes, values: Tensor, style: Style) -> None:
    from matplotlib.patches import Rectangle

    for row, column in enumerate(values.argmax(-1).tolist()):
        if values[row, column] > 0:
            ax.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=style.mark, linewidth=1.1, zorder=3)
            )


def _fit(
    ax: Axes, rows: Axis, columns: Axis, row_names: list[str] | None, column_names: list[str] | None, style: Style
) -> None:
    _figure.fit_tokens(ax, row_names if rows.size == 1 else None, column_names if columns.size == 1 else None, style)


def _panels(
    ax: Axes | None, style: str | None, size: tuple[float, float], down: int, across: int
) -> tuple[Any, Style, Figure]:
    """The grid's axes as a (down, across) array: of a new figure, or in the place of `ax`."""
    _figure.require_matplotlib()
    chosen = _figure.choose_style(style, ax)
    if ax is None:
        figure = _figure.new_figure(size, chosen, "compressed")
        return figure.subplots(down, across, squeeze=False), chosen, figure
    place = ax.get_subplotspec()
    if place is None:
        raise ValueError("ax is not part of a grid; head_grid divides one that pyplot.subplots or add_subplot made.")
    ax.set_axis_off()
    grid = place.subgridspec(down, across)
    return grid.subplots(squeeze=False), chosen, ax.figure


def _write_small(write: Callable[..., Text], text: str, style: Style, **options: Any) -> None:
    write(text, color=style.ink, fontsize=8, **options).set_parse_math(False)
