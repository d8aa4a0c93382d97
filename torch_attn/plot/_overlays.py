"""Attention laid over what was attended to: image_overlay (patches) and spectrogram_overlay (frames)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _figure
from ._arrays import BINNINGS, Axis, bin_map, check_choice, check_count, to_tokens, to_weights
from ._colors import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


def image_overlay(
    image: Any,
    weights: Any,
    *,
    patch_grid: tuple[int, int] | None = None,
    title: str | None = None,
    value_label: str = "attention weight",
    show_grid: bool = True,
    opacity: float = 0.9,
    vmax: float | None = None,
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """An image in grey with a glow over its patches: the stronger, the more of the attention a patch gets.

    Args:
        image: (height, width), (1 or 3, height, width) or (height, width, 1 or 3). Bytes run from 0 to 255; floats are
            taken as they are between 0 and 1, and otherwise stretched from their smallest to their largest value.
        weights: (patches,), row by row from the top left, or (patch rows, patch columns). A class token is no patch:
            leave it out, as in ``weights[1:]``.
        patch_grid: (patch rows, patch columns) of flat weights; None: square patches, found from the image's shape.
        show_grid: draw the patches' borders.
        opacity: of the glow over the largest weight, above 0 and at most 1.
        title, value_label, vmax, style, ax: as in :func:`heatmap`.

    Returns:
        the figure.

    Raises:
        ValueError: a shape or value that is not allowed. ImportError: no matplotlib.
    """
    if not 0 < opacity <= 1:
        raise ValueError(f"opacity is {opacity}; it must be above 0 and at most 1.")
    grey = _to_grey(image)
    height, width = grey.shape
    shares = to_weights(weights, "(patches,) or (patch rows, patch columns)", (1, 2))
    if shares.dim() == 1:
        shares = shares.view(_patch_grid(shares.numel(), height, width, patch_grid))

    inch = 3.4 / max(height, width)
    ax, chosen, _ = _figure.start(ax, style, (width * inch + 1.3, height * inch + 0.5))
    _figure.dress(ax, chosen)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(_faded(grey, chosen), cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    norm = _figure.color_norm("linear", vmax, shares.max().item())
    glow = ax.imshow(shares.numpy(), cmap=_glow(chosen, opacity), norm=norm, extent=extent, interpolation="none")
    if show_grid:
        rows, columns = shares.shape
        line = {"color": chosen.muted, "linewidth": 0.5, "alpha": 0.45}
        ax.hlines([row * height / rows - 0.5 for row in range(1, rows)], -0.5, width - 0.5, **line)
        ax.vlines([column * width / columns - 0.5 for column in range(1, columns)], -0.5, height - 0.5, **line)
    ax.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:], aspect="equal")
    _figure.write_title(ax, title, chosen)
    _figure.color_bar(ax, glow, value_label, chosen, "max" if shares.max().item() > norm.vmax else "neither")
    _figure.settle(ax.figure)
    return ax.figure


def spectrogram_overlay(
    spectrogram: Any,
    weights: Any,
    tokens: Sequence[object] | None = None,
    *,
    seconds: float | None = None,
    hertz: float | None = None,
    title: str | None = None,
    value_label: str = "attention weight",
    max_cells: int = 512,
    binning: str = "mean",
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    style: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A spectrogram, and above it, on the same time axis, how much of the attention each frame gets.

    Args:
        spectrogram: (bins, time), the lowest frequency first; any finite values, such as decibels. What is below the
            quietest fifth looks alike.
        weights: (frames,), drawn as a curve, and as a glow over the frames; or (L, frames), drawn as a map with a row
            for each of L queries. There may be fewer frames than spectrogram columns (a model that subsamples by 4
            has a quarter): each frame covers an equal share of the time.
        tokens: the L queries' names.
        seconds: the spectrogram's length; None: the time axis counts spectrogram columns.
        hertz: the frequency at the top; None: the frequency axis counts bins.
        max_cells: more frames than this are binned, as in :func:`heatmap`.
        title, value_label, binning, vmax, cmap, style, ax: as in :func:`heatmap`.

    Returns:
        the figure.

    Raises:
        ValueError: a shape, value or choice that is not allowed. ImportError: no matplotlib.
    """
    _figure.require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    check_count(max_cells, "max_cells")
    check_choice(binning, "binning", BINNINGS)
    power = torch.as_tensor(spectrogram).detach().to("cpu", torch.float32)
    if power.dim() != 2 or power.numel() == 0 or not bool(torch.isfinite(power).all()):
        raise ValueError(f"spectrogram has shape {tuple(power.shape)}; allowed is (bins, time) of finite values.")
    shares = to_weights(weights, "(frames,) or (L, frames)", (1, 2))
    names = to_tokens(tokens, shares.size(0) if shares.dim() == 2 else 1, "tokens")
    frames = Axis.fit(shares.size(-1), max_cells)
    rows = Axis.fit(shares.size(0) if shares.dim() == 2 else 1, 1 if shares.dim() == 1 else max_cells)
    cells = bin_map(shares.view(rows.length, frames.length), rows, frames, binning)

    strip_inches = 0.8 if shares.dim() == 1 else min(3.0, max(1.1, 0.2 * rows.length))
    ax, chosen, _ = _figure.start(ax, style, (7.5, 2.6 + strip_inches))
    _figure.dress(ax, chosen)
    end = seconds if seconds is not None else float(power.size(1))
    top = hertz if hertz is not None else float(power.size(0))
    extent = (0.0, end, 0.0, top)
    shades = "gray" if chosen.is_dark else "gray_r"  # silence recedes
    quiet = power.flatten().kthvalue(1 + power.numel() // 5).values.item()
    ax.imshow(power.numpy(), cmap=shades, vmin=quiet, origin="lower", extent=extent, aspect="auto", alpha=0.85)
    ax.set_xlabel("time (s)" if seconds is not None else "spectrogram column")
    ax.set_ylabel("frequency (Hz)" if hertz is not None else "bin")

    height = ax.get_window_extent().height / ax.figure.dpi
    strip = ax.inset_axes((0, 1 + 0.1 / height, 1, strip_inches / height), sharex=ax)
    _figure.dress(strip, chosen)
    strip.tick_params(labelbottom=False, bottom=False)
    norm = _figure.color_norm("linear", vmax, cells.max().item())
    covered = end * frames.cells * frames.size / frames.length  # a last, smaller cell reaches beyond the end
    label = _figure.value_label(value_label, rows, frames, binning)
    if shares.dim() == 1:
        glow = ax.imshow(
            cells.numpy(), cmap=_glow(chosen, 0.7), norm=norm, extent=(0.0, covered, 0.0, top), aspect="auto"
        )
        edges = torch.linspace(0, covered, frames.cells + 1)
        strip.stairs(cells[0].numpy(), edges.numpy(), fill=True, color=chosen.mark, alpha=0.85)
        strip.set_ylim(0, norm.vmax * 1.05)
        # Pruned, as its 0 would touch the labels below.
        strip.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=[1, 2, 5, 10], prune="lower"))
        strip.set_ylabel("weight")
        _figure.color_bar(ax, glow, label, chosen, "neither")
    else:
        span = (0.0, covered, rows.cells * rows.size - 0.5, -0.5)
        ramp = _figure.color_map(chosen, cmap)
        drawn = strip.imshow(cells.numpy(), cmap=ramp, norm=norm, extent=span, aspect="auto", interpolation="none")
        strip.set_ylim(rows.length - 0.5, -0.5)
        _figure.label_axis(strip.yaxis, rows, names, "query", chosen)
        _figure.color_bar(strip, drawn, label, chosen, "neither")
    ax.set(xlim=(0, end), ylim=(0, top))
    if frames.size > 1:
        ax.set_xlabel(f"{ax.get_xlabel()}; weights: {frames.note.replace('tokens', 'frames')}")
    _figure.write_title(strip, title, chosen)
    if names is not None and rows.size == 1:
        _figure.fit_tokens(strip, names, None, chosen)
    _figure.settle(ax.figure)
    return ax.figure


def _to_grey(image: Any) -> Tensor:
    """(height, width) between 0 and 1."""
    pixels = torch.as_tensor(image).detach().to("cpu")
    is_bytes = pixels.dtype == torch.uint8
    values = pixels.to(torch.float32)
    if values.dim() == 3 and values.size(0) in (1, 3):
        values = values.movedim(0, -1)
    if values.dim() == 3 and values.size(-1) in (1, 3):
        luma = torch.tensor([0.299, 0.587, 0.114] if values.size(-1) == 3 else [1.0])  # ITU-R BT.601
        values = values @ luma
    if values.dim() != 2 or values.numel() == 0:
        shapes = "(height, width), (1 or 3, height, width) or (height, width, 1 or 3)"
        raise ValueError(f"image has shape {tuple(pixels.shape)}; allowed is {shapes}.")
    if not bool(torch.isfinite(values).all()):
        raise ValueError("image holds infinite or NaN values; pixels are finite.")
    if is_bytes:
        return values / 255
    low, high = values.min(), values.max()
    return values if low >= 0 and high <= 1 else (values - low) / (high - low).clamp_min(1e-12)


def _patch_grid(patches: int, height: int, width: int, given: tuple[int, int] | None) -> tuple[int, int]:
    """(patch rows, patch columns) of flat weights."""
    if given is not None:
        if math.prod(given) != patches:
            raise ValueError(f"weights has {patches} entries; patch_grid {given} makes {math.prod(given)} patches.")
        return given
    rows = round(math.sqrt(patches * height / width))
    if rows > 0 and patches % rows == 0 and height * (patches // rows) == width * rows:
        return rows, patches // rows
    raise ValueError(
        f"weights has {patches} entries, which square patches of a {height} x {width} image do not give; leave out the "
        "class token, weights[1:], or give patch_grid=(rows, columns)."
    )


def _faded(grey: Tensor, style: Style) -> Any:
    """The image with less contrast, on the style's side of grey, so that the glow is what one sees."""
    return (0.7 * grey if style.is_dark else 0.3 + 0.7 * grey).numpy()


def _glow(style: Style, opacity: float) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("glow", [to_rgba(style.mark, 0), to_rgba(style.mark, opacity)])
