"""html: one page with every head of every layer, to be looked at with a mouse or a keyboard; it loads nothing.

The page's parts lie in viewer/: page.html (structure), style.css, maps.js (the data) and viewer.js (what one sees and
does). A content security policy forbids the page every connection, and every script but its own.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import html as markup
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._arrays import BINNINGS, Axis, bin_map, check_choice, check_count, to_layers, to_tokens
from ._colors import DARK, LIGHT, STYLES, Style

VIEWER = Path(__file__).parent / "viewer"
LEVELS = 255  # a weight is stored as a whole number of 255ths of its row's largest


class Page(str):
    """The page's text. ``page.save("maps.html")`` writes it, and a notebook shows it."""

    def save(self, file: str | Path) -> Path:
        """Write the page, in UTF-8, and return where."""
        path = Path(file)
        path.write_text(self, encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        frame = 'style="width: 100%; height: 820px; border: 0" title="attention maps"'
        return f'<iframe srcdoc="{markup.escape(self)}" {frame}></iframe>'


def html(
    weights: Any,
    tokens: Sequence[object] | None = None,
    *,
    key_tokens: Sequence[object] | None = None,
    layer_names: Sequence[object] | None = None,
    head_names: Sequence[object] | None = None,
    title: str = "Attention maps",
    query_label: str = "query",
    key_label: str = "key",
    value_label: str = "attention weight",
    max_cells: int = 128,
    binning: str = "mean",
) -> Page:
    """A self-contained HTML page: choose a layer and a head, point at a token to see where it attends, read numbers.

    It works without a network and without matplotlib, by mouse, touch and keyboard, and is light or dark as the
    reader's system is. Tokens and titles are shown as text, whatever they hold.

    Args:
        weights: what :func:`torch_attn.record_attention` recorded; or (L, S), (heads, L, S) or (layers, heads, L, S);
            or a sequence, or a mapping from layers' names, of one (heads, L, S) a layer, whose numbers of heads may
            differ. A batch of one may come before the heads.
        tokens: the L queries' names; also the keys', where ``key_tokens`` is None and L equals S.
        key_tokens: the S keys' names.
        layer_names: one name a layer; None: the record's or mapping's names, or "layer 0", ...
        head_names: one name a head of the layer with the most heads; None: "head 0", ...
        title, query_label, key_label, value_label: texts.
        max_cells: maps with more rows or columns are binned to at most so many cells a side.
        binning: what a cell holds of its weights, ``"mean"`` or ``"max"``.

    Returns:
        the page, a string with a ``save`` method. Each cell takes one byte (4/3 in base64): a weight is stored as a
        whole number of 255ths of its row's largest, so it is off by at most 0.2 % of that.

    Raises:
        ValueError: a shape, value or choice that is not allowed.
    """
    check_count(max_cells, "max_cells")
    check_choice(binning, "binning", BINNINGS)
    names, layers = to_layers(weights)
    length, keys = layers[0].shape[-2:]
    if any(layer.shape[-2:] != (length, keys) for layer in layers):
        shapes = ", ".join(str(tuple(layer.shape)) for layer in layers)
        raise ValueError(
            f"weights has layers of shapes {shapes}; L and S must be the same in each: make a page for each."
        )
    query_names = to_tokens(tokens, length, "tokens")
    if key_tokens is None and length == keys:
        key_tokens = tokens
    most_heads = max(layer.size(0) for layer in layers)
    rows, columns = Axis.fit(length, max_cells), Axis.fit(keys, max_cells)
    stored = [_quantise(bin_map(layer, rows, columns, binning)) for layer in layers]
    payload = {
        "layers": to_tokens(layer_names, len(layers), "layer_names") or names,
        "heads": to_tokens(head_names, most_heads, "head_names") or [f"head {head}" for head in range(most_heads)],
        "counts": [layer.size(0) for layer in layers],
        "query": {**asdict(rows), "cells": rows.cells, "label": query_label, "tokens": query_names},
        "key": {
            **asdict(columns),
            "cells": columns.cells,
            "label": key_label,
            "tokens": to_tokens(key_tokens, keys, "key_tokens"),
        },
        "binning": binning if rows.size > 1 or columns.size > 1 else "",
        "valueLabel": value_label,
        "levels": LEVELS,
        "ramps": {name: style.ramp for name, style in STYLES.items()},
        "weights": _base64(torch.cat([levels.flatten() for levels, _ in stored])),
        "scales": _base64(torch.cat([scales.flatten() for _, scales in stored])),
    }
    return Page(_fill(payload, title, _about(payload, rows, columns)))


def _quantise(cells: Tensor) -> tuple[Tensor, Tensor]:
    """(..., L, S) -> whole numbers up to LEVELS (..., L, S), and what the largest of each row stands for (..., L)."""
    scales = cells.amax(-1)
    levels = (cells / scales.clamp_min(torch.finfo(scales.dtype).tiny).unsqueeze(-1) * LEVELS).round()
    return levels.to(torch.uint8), scales


def _base64(values: Tensor) -> str:
    """The tensor's bytes, as they lie in memory (little-endian, as in every browser)."""
    values = values.contiguous()
    return base64.b64encode(ctypes.string_at(values.data_ptr(), values.nbytes)).decode("ascii")


def _about(payload: dict[str, Any], rows: Axis, columns: Axis) -> str:
    layers, heads = len(payload["counts"]), sum(payload["counts"])
    parts = [
        f"{layers} layer{'s' * (layers > 1)}, {heads} head{'s' * (heads > 1)}, "
        f"{rows.length} {payload['query']['label']} by {columns.length} {payload['key']['label']} tokens."
    ]
    if payload["binning"]:
        kind = "mean" if payload["binning"] == "mean" else "largest"
        parts.append(f"Each cell is the {kind} weight of {rows.size} by {columns.size} tokens.")
    parts.append("Weights are stored in 8 bits, each within 0.2 % of its row's largest.")
    return " ".join(parts)


def _fill(payload: dict[str, Any], title: str, about: str) -> str:
    """The page with its parts put in, all in one pass, so that no part's text is taken for a place to fill."""
    style = _colors() + _read("style.css")
    script = _read("maps.js") + _read("viewer.js")
    data = json.dumps(payload, separators=(",", ":"))
    for sign in "<>&":  # within JSON these stand only in strings, and "</script>" or "<!--" would end the element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    parts = {
        "title": markup.escape(title),
        "about": markup.escape(about),
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:",
        "style": style,
        "script": script,
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return (VIEWER / name).read_text(encoding="utf-8")


def _colors() -> str:
    """The styles' colours as CSS variables: light, and dark for readers whose system is."""

    def variables(style: Style) -> str:
        names = ("background", "panel", "ink", "muted", "grid", "mark")
        colors = "".join(f"--{name}: {getattr(style, name)};" for name in names)
        return f":root {{ {colors} --bar: {style.ramp[5]}; }}\n"

    return variables(LIGHT) + f"@media (prefers-color-scheme: dark) {{ {variables(DARK)} }}\n"


def _hash(source: str) -> str:
    """The source as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode('ascii')}'"
