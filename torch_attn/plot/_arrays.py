"""What every picture does with its numbers before it draws: checks them, and bins maps that have more tokens than a
picture has room for. Torch alone, so that the HTML page needs no matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINNINGS = ("mean", "max")


@dataclass(frozen=True)
class Axis:
    """One side of a map: `length` tokens, drawn as cells of `size` tokens each; the last cell may hold fewer."""

    length: int
    size: int

    @classmethod
    def fit(cls, length: int, max_cells: int) -> Axis:
        """The smallest cells of which at most `max_cells` are needed."""
        return cls(length, -(-length // max_cells))

    @property
    def cells(self) -> int:
        return -(-self.length // self.size)

    @property
    def note(self) -> str:
        """What a cell stands for, for the axis's label; empty where it is one token."""
        if self.size == 1:
            return ""
        rest = self.length % self.size
        return f"{self.size} tokens a cell" + (f", the last {rest}" if rest else "")


def to_weights(weights: Any, shapes: str, dims: tuple[int, ...], name: str = "weights") -> Tensor:
    """`weights` as a float32 tensor on the CPU; `shapes` says in words what `dims` allows."""
    values = torch.as_tensor(weights).detach().to("cpu", torch.float32)
    while values.dim() > max(dims) and values.size(0) == 1:  # a batch of one
        values = values[0]
    if values.dim() not in dims:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; allowed is {shapes}.")
    if values.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; a picture needs at least one weight.")
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError(f"{name} holds negative, infinite or NaN values; attention weights are finite and at least 0.")
    return values


def to_layers(weights: Any) -> tuple[list[str], list[Tensor]]:
    """The layers' names, and (heads, L, S) for each, of whatever may hold several layers.

    From a record of torch_attn.record_attention, which holds the maps of each call, the newest are taken.
    """
    maps = getattr(weights, "maps", weights)
    if isinstance(maps, Mapping):
        if not maps:
            raise ValueError("weights holds no maps: run the model within record_attention, with maps asked for.")
        newest = {str(name): calls[-1] if isinstance(calls, list) else calls for name, calls in maps.items()}
        return list(newest), [_to_heads(layer, f"the map of {name!r}") for name, layer in newest.items()]
    if isinstance(weights, (list, tuple)) and weights and all(hasattr(layer, "shape") for layer in weights):
        layers = [_to_heads(layer, f"weights[{place}]") for place, layer in enumerate(weights)]
    else:
        shapes = "(L, S), (heads, L, S), (layers, heads, L, S), or one (heads, L, S) a layer"
        several = to_weights(weights, shapes, (2, 3, 4))
        layers = list(several) if several.dim() == 4 else [_to_heads(several, "weights")]
    return [f"layer {place}" for place in range(len(layers))], layers


def _to_heads(layer: Any, name: str) -> Tensor:
    maps = to_weights(layer, "(heads, L, S) or (L, S): choose one of a batch", (2, 3), name)
    return maps if maps.dim() == 3 else maps.unsqueeze(0)


def to_tokens(tokens: Sequence[object] | None, length: int, name: str) -> list[str] | None:
    """The tokens as text, one for each of `length` places."""
    if tokens is None:
        return None
    if isinstance(tokens, str):
        raise TypeError(f"{name} is one string; it must be a sequence with one entry a token, such as {name}.split().")
    texts = [str(token) for token in tokens]
    if len(texts) != length:
        raise ValueError(f"{name} has {len(texts)} entries, and that side of the map has {length}.")
    return texts


def check_choice(value: str, name: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def check_count(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1.")


def bin_map(weights: Tensor, rows: Axis, columns: Axis, binning: str) -> Tensor:
    """(..., L, S) -> (..., rows.cells, columns.cells): the mean, or the largest, of the weights in each cell."""
    return _bin_last(_bin_last(weights, columns, binning).mT, rows, binning).mT


def _bin_last(values: Tensor, axis: Axis, binning: str) -> Tensor:
    if axis.size == 1:
        return values
    whole = axis.length // axis.size * axis.size
    parts = [values[..., :whole].unflatten(-1, (-1, axis.size))]
    if whole < axis.length:
        parts.append(values[..., None, whole:])
    return torch.cat([part.amax(-1) if binning == "max" else part.mean(-1) for part in parts], dim=-1)
