"""What the figures share: matplotlib, imported when the first one is drawn; styles, axes, labels and colour bars."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from ._arrays import Axis, check_choice
from ._colors import STYLES, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as MplAxis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.text import Text

COLOR_SCALES = ("linear", "sqrt", "log")
LOG_DECADES = 4  # how far below its top a logarithmic colour scale reaches

LABEL_SIZES = (5.5, 9.0)  # points; the smallest that is read without a magnifying glass, and the usual
BESIDE_THE_AXES = 1.4  # inches left of the axes and a margin, at most: what a title cannot use
LINE = 1.2  # a line of text needs this many times its font size
NAMED = " (1 token in "
LONGEST = 18  # characters; longer tokens are cut, or they would leave no room for the map


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "torch_attn.plot draws with matplotlib, which is not installed: run `pip install matplotlib` "
            "(or install torch_attn with the extra `plot`). torch_attn.plot.html works without it."
        ) from error


@cache
def _figure_class() -> type:
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A Figure that belongs to no window: pyplot keeps no reference to it, and a notebook shows it by itself."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=144)
            return buffer.getvalue()

    return NotebookFigure


def new_figure(size: tuple[float, float], style: Style, layout: str = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure_class()(figsize=size, dpi=144, facecolor=style.background, layout=layout)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def choose_style(style: str | None, ax: Axes | None) -> Style:
    """`style` by name; None is light, or what suits the background of the figure that `ax` belongs to."""
    if style is not None:
        check_choice(style, "style", tuple(STYLES))
        return STYLES[style]
    if ax is None:
        return STYLES["light"]
    from matplotlib.colors import to_rgba

    red, green, blue, alpha = to_rgba(ax.figure.get_facecolor())
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return STYLES["dark" if alpha > 0.5 and luminance < 0.4 else "light"]


def start(ax: Axes | None, style: str | None, size: tuple[float, float]) -> tuple[Axes, Style, bool]:
    """The axes to draw on, their style, and whether they (and their figure) are new."""
    require_matplotlib()
    chosen = choose_style(style, ax)
    if ax is not None:
        return ax, chosen, False
    return new_figure(size, chosen).add_subplot(), chosen, True


def color_map(style: Style, cmap: str | Colormap | None) -> Colormap:
    from matplotlib import colormaps
    from matplotlib.colors import Colormap, LinearSegmentedColormap

    if cmap is None:
        return LinearSegmentedColormap.from_list("torch_attn", style.ramp)
    return cmap if isinstance(cmap, Colormap) else colormaps[cmap]


def color_norm(color_scale: str, vmax: float | None, largest: float) -> Normalize:
    """From 0 (logarithmic: 1/10000 of the top) to `vmax`, or to the largest weight that is drawn."""
    from matplotlib.colors import LogNorm, Normalize, PowerNorm

    check_choice(color_scale, "color_scale", COLOR_SCALES)
    if vmax is not None and not vmax > 0:
        raise ValueError(f"vmax is {vmax}; it must be above 0.")
    top = vmax if vmax is not None else (largest or 1.0)
    if color_scale == "log":
        return LogNorm(top / 10**LOG_DECADES, top, clip=True)  # a weight of 0 is drawn as the smallest
    return PowerNorm(0.5, 0, top) if color_scale == "sqrt" else Normalize(0, top)


def dress(ax: Axes, style: Style) -> None:
    """Quiet frame and ticks, so that the data is what one sees."""
    ax.set_facecolor(style.background)
    for spine in ax.spines.values():
        spine.set(color=style.grid, linewidth=0.8)
    ax.tick_params(color=style.grid, labelcolor=style.muted, labelsize=8, length=2.5, width=0.8, pad=2.5)
    ax.xaxis.label.set(color=style.ink, fontsize=9)
    ax.yaxis.label.set(color=style.ink, fontsize=9)


def write_title(ax: Axes, title: str | None, style: Style) -> None:
    if title:
        text = ax.set_title(title, loc="left", color=style.ink, fontsize=11, fontweight="bold", pad=8)
        text.set_parse_math(False)
        wrap(text, BESIDE_THE_AXES)


def wrap(text: Text, margin: float) -> None:
    """Break the text between words into lines as long as its figure is wide, less so many inches."""
    room = text.figure.bbox.width - margin * text.figure.dpi
    done, words = [], text.get_text().split(" ")
    while words:
        count = len(words)
        text.set_text(" ".join(words))
        while count > 1 and text.get_window_extent().width > room:
            count -= 1
            text.set_text(" ".join(words[:count]))
        done.append(text.get_text())
        words = words[count:]
    text.set_text("\n".join(done))


def color_bar(ax: Axes, mappable: ScalarMappable, label: str, style: Style, extend: str = "neither") -> None:
    """A slim bar as high as the map itself, 0.12 inch wide whatever the map's size."""
    width = ax.get_window_extent().width / ax.figure.dpi
    cax = ax.inset_axes((1 + 0.12 / width, 0, 0.12 / width, 1))
    dress_bar(ax.figure.colorbar(mappable, cax=cax, extend=extend), label, style)


def dress_bar(bar: Colorbar, label: str, style: Style) -> None:
    bar.ax.set_facecolor(style.background)
    bar.outline.set(edgecolor=style.grid, linewidth=0.8)
    bar.set_label(label, color=style.ink, fontsize=9)
    bar.ax.yaxis.label.set_parse_math(False)
    bar.ax.tick_params(which="both", color=style.grid, labelcolor=style.muted, labelsize=8, length=2.5, width=0.8)


def value_label(label: str, rows: Axis, columns: Axis, binning: str) -> str:
    """The colour bar's label, which says what the colour of a cell is made of."""
    if rows.size == columns.size == 1:
        return label
    return f"{label}, {'mean' if binning == 'mean' else 'largest'} of {rows.size} x {columns.size}"


def printable(token: str, longest: int = LONGEST) -> str:
    """A token as a label: white space made visible, long ones cut."""
    for blank, sign in (("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        token = token.replace(blank, sign)
    if token and not token.strip(" "):
        token = "␣" * len(token)
    token = "".join(sign if sign.isprintable() else "�" for sign in token)
    return token if len(token) <= longest else token[: longest - 1] + "…"


def label_axis(axis: MplAxis, side: Axis, tokens: Sequence[str] | None, label: str, style: Style) -> None:
    """Tokens where a cell is one token and they are known, positions otherwise; the label says what a cell holds."""
    if tokens is not None and side.size == 1:
        axis.set_ticks([])  # fit_tokens writes them
        axis.set_tick_params(length=0)
    else:
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    text = axis.set_label_text(f"{label} ({side.note})" if side.note else label)
    text.set_parse_math(False)


def fit_tokens(
    ax: Axes, rows: Sequence[str] | None, columns: Sequence[str] | None, style: Style, longest: int = LONGEST
) -> None:
    """Size the tokens to the room they have, and where even the smallest do not fit label every second, third, ...

    Called last: the room is known when all else has its place.
    """
    if rows is None and columns is None:
        return
    rows, columns = (names and [printable(name, longest) for name in names] for names in (rows, columns))
    for _ in range(2):  # smaller labels leave the map more room
        ax.figure.draw_without_rendering()
        box = ax.get_window_extent()
        per_point = 72 / ax.figure.dpi
        if rows is not None:
            _fit_axis(ax.yaxis, rows, box.height * per_point / len(rows), style)
        if columns is not None:
            _fit_axis(ax.xaxis, columns, box.width * per_point / len(columns), style)


def settle(figure: Figure | SubFigure) -> None:
    """Let the layout find everything's place. What hangs on axes (strips, bars) moves with them: it takes two goes."""
    for _ in range(2):
        figure.draw_without_rendering()


def _fit_axis(axis: MplAxis, tokens: Sequence[str], room: float, style: Style) -> None:
    smallest, usual = LABEL_SIZES
    upright = axis.axis_name == "x" and max(map(len, tokens)) > 1
    size = min(usual, max(smallest, room / LINE))
    stride = max(1, -int(-LINE * smallest // room)) if size == smallest else 1
    _set_tokens(axis, tokens, stride, size, style)
    if stride > 1:
        label = axis.get_label_text().split(NAMED)[0]
        axis.set_label_text(f"{label}{NAMED}{stride} is named)")
    if upright:
        widest = max(_width(text) for text in axis.get_ticklabels())
        if widest > room * stride * 0.92:
            axis.set_tick_params(rotation=90)


def _width(text: Text) -> float:
    return text.get_window_extent().width * 72 / text.figure.dpi


def _set_tokens(axis: MplAxis, tokens: Sequence[str], stride: int, size: float, style: Style) -> None:
    places = range(0, len(tokens), stride)
    axis.set_ticks(places, [tokens[place] for place in places], color=style.ink, fontsize=size)
    axis.set_tick_params(rotation=0)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)  # a token may hold dollar signs
