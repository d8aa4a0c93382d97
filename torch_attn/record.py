"""record_attention: the attention maps of every layer of a running model, or statistics of them.

What a layer computed is taken where it passes the dispatcher, at the operators in ``_LOGSUMEXP``: below autograd and
autocast, for every caller alike, so that nothing of the model or its gradients changes. Hooks on modules say which
layer it was.
"""

from __future__ import annotations

import fnmatch
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .maps import AttentionStatistics, attention_statistics, attention_weights

Reduce = Literal["mean", "sum"] | Callable[[Tensor], Tensor] | None

# Their mean over a batch says nothing.
_INDICES = ("argmax", "top_indices")

# The operators that attend, which take query and key first: where logsumexp is among their results.
_LOGSUMEXP = {
    torch.ops.torch_attn.attention_forward.default: 1,
    torch.ops.torch_attn.attention_with_weights_forward.default: 2,
}
_NOT_OF_MAPS = ("dropout_p", "rng_state", "mean")  # the arguments that maps do not take


class AttentionRecord:
    """What :func:`record_attention` collects; readable inside the block and after it.

    Attributes:
        dropped: how many tensors were not kept because ``max_bytes`` was reached.
    """

    def __init__(self, reduce: Reduce, device: torch.device | str | None, max_bytes: int) -> None:
        self.dropped = 0
        self._reduce = reduce
        self._device = device
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: dict[str, dict[str, list[Tensor]]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    @property
    def layers(self) -> list[str]:
        """The recorded layers' names in ``model.named_modules()``, in the order in which they first ran."""
        return list(self._kept)

    @property
    def maps(self) -> dict[str, list[Tensor]]:
        """Each layer's maps, one a call in the order of the calls: (B, Hq', L', S), or (B, L', S) for ``heads="mean"``.

        With ``reduce="mean"`` or ``"sum"`` one map, without B.
        """
        return {layer: self._values(layer, "map") for layer, kept in self._kept.items() if "map" in kept}

    @property
    def statistics(self) -> dict[str, dict[str, list[Tensor]]]:
        """Each layer's statistics by name, one a call; :class:`torch_attn.AttentionStatistics` says what they are."""
        return {
            layer: {name: self._values(layer, name) for name in kept if name != "map"}
            for layer, kept in self._kept.items()
            if set(kept) - {"map"}
        }

    def last_maps(self) -> list[Tensor]:
        """The newest map of each layer, as :func:`torch_attn.attention_rollout` takes them."""
        return [maps[-1] for maps in self.maps.values()]

    def _values(self, layer: str, name: str) -> list[Tensor]:
        kept = self._kept[layer][name]
        return [kept[0] / self._counts[layer, name]] if self._reduce == "mean" else list(kept)

    def _add(self, layer: str, name: str, x: Tensor) -> None:
        if callable(self._reduce):
            x = self._reduce(x)
        running = self._reduce in ("mean", "sum")
        if running:
            self._counts[layer, name] = self._counts.get((layer, name), 0) + x.size(0)
            x = x.sum(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        x = x.to(self._device) if self._device is not None else x
        kept = self._kept.setdefault(layer, {}).setdefault(name, [])
        if running and kept:
            if kept[0].shape != x.shape:
                raise ValueError(
                    f"record_attention(reduce={self._reduce!r}) adds up calls of one shape, but {name} of {layer} was "
                    f"{tuple(kept[0].shape)} and is now {tuple(x.shape)}: use reduce=None, or a function that brings "
                    "them to one shape."
                )
            kept[0] += x
            return
        size = x.numel() * x.element_size()
        if self._bytes + size > self._max_bytes:
            if not self.dropped:
                warnings.warn(
                    f"record_attention keeps max_bytes = {self._max_bytes} and drops what is beyond: choose layers, "
                    "heads or queries, or reduce.",
                    stacklevel=2,
                )
            self.dropped += 1
            return
        self._bytes += size
        # A reduction or a choice may be a view, which would keep the whole map alive.
        kept.append(x.clone() if x.untyped_storage().nbytes() > size else x)


@contextmanager
def record_attention(
    model: nn.Module,
    *,
    layers: str | int | Sequence[str | int] | None = None,
    heads: Literal["all", "mean"] | Sequence[int] = "all",
    queries: slice | Sequence[int] | Tensor | None = None,
    reduce: Reduce = None,
    statistics: Sequence[str] | None = None,
    maps: bool | None = None,
    top_k: int = 8,
    mass_window: int = 16,
    device: torch.device | str | None = None,
    max_bytes: int = 2**30,
) -> Iterator[AttentionRecord]:
    """Collect what the attention layers of ``model`` attend while it runs in the ``with`` block.

    ::

        with torch_attn.record_attention(model, heads="mean") as record:
            model(x)
        record.maps["encoder.layers.0.self_attn"][0]  # (B, L, S)

    Recorded is every attention that this library computes inside ``model``: :class:`torch_attn.MultiheadAttention`,
    replaced :class:`torch.nn.MultiheadAttention`, transformers through ``attn_implementation="torch_attn"``, PyTorch's
    ``scaled_dot_product_attention`` inside :class:`torch_attn.patch_sdpa`, and layers of your own that call
    :func:`torch_attn.attention` or :func:`torch_attn.scaled_dot_product_attention`. The model's outputs and gradients
    are bit-equal to a run without it. Weights are those before dropout; leading dimensions are flattened into one, B. A
    forward pass repeated by activation checkpointing in backward is not recorded again. Other threads are not recorded.
    Blocks may be nested.

    Args:
        model: the model, whose modules' names name the layers.
        layers: which to record: names or patterns (``"*.self_attn"``), or places in the order in which layers first
            run; None: all.
        heads: all, their mean (Hq · L · S is then never stored), or some by index; for statistics likewise.
        queries: the rows to keep; None: all. Statistics of rows are chosen alike, column sums are of all rows.
        reduce: "mean" or "sum" over batch and calls, which needs calls of one shape and the memory of one of them; a
            function of each tensor, of which the result is kept; None: keep every call's.
        statistics: names of :class:`torch_attn.AttentionStatistics`' fields, computed in O(L) memory.
        maps: collect the maps; None: only if no statistics are asked for.
        top_k: of the statistics "top_weights" and "top_indices".
        mass_window: of the statistic "window_mass".
        device: where to keep what is recorded; None: where it was computed.
        max_bytes: how much to keep; what is beyond is dropped, counted in ``record.dropped``, with one warning.

    Raises:
        ValueError: for a layer or statistic that does not exist.

    Yields:
        :class:`AttentionRecord`.
    """
    wanted = tuple(statistics or ())
    _check_statistics(wanted, heads, reduce)
    names = {module: name for name, module in model.named_modules()}
    chosen = _choose_layers(layers, names.values())
    record = AttentionRecord(reduce, device, max_bytes)
    options = {"top_k": top_k, "mass_window": mass_window}

    def observe(layer: str, query: Tensor, key: Tensor, logsumexp: Tensor, given: dict[str, Any]) -> None:
        if maps or (maps is None and not wanted):
            weights = attention_weights(query, key, **given, logsumexp=logsumexp, heads=heads, queries=queries)
            record._add(layer, "map", weights)
        if wanted:
            for name, x in _statistics(query, key, wanted, given, **options).items():
                record._add(layer, name, _choose(name, x, heads, queries))

    watch = _Watch(names, chosen, observe)
    handles = [
        register_module_forward_pre_hook(watch.enter),
        register_module_forward_hook(watch.leave, always_call=True),
    ]
    try:
        with watch:
            yield record
    finally:
        for handle in handles:
            handle.remove()
    if not watch.seen:
        warnings.warn(
            "record_attention saw no attention of torch_attn inside the model: call torch_attn.replace_mha(model), or "
            'model.set_attn_implementation("torch_attn") for transformers, or enter torch_attn.patch_sdpa(), and run '
            "the model in the block.",
            stacklevel=3,
        )


class _Watch(TorchDispatchMode):
    """Sees every call that attends in this thread, and knows the module in whose forward it happens."""

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        chosen: Callable[[str, int], bool],
        observe: Callable[[str, Tensor, Tensor, Tensor, dict[str, Any]], None],
    ) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}  # each layer's place in the order of first calls
        self._names = names
        self._chosen = chosen
        self._observe = observe
        self._running: list[nn.Module] = []
        self._thread = threading.get_ident()

    def enter(self, module: nn.Module, args: Any) -> None:
        if module in self._names and threading.get_ident() == self._thread:
            self._running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == self._thread and self._running and self._running[-1] is module:
            self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Inside backward it is a checkpoint that runs forward again.
        repeated = torch._C._current_graph_task_id() != -1
        if func in _LOGSUMEXP and self._running and not repeated:
            layer = self._names[self._running[-1]]
            if kwargs.get("cu_seqlens_q") is not None or kwargs.get("block_table") is not None:
                raise RuntimeError(
                    f"record_attention does not record packed sequences or paged caches, as in {layer!r}."
                )
            place = self.seen.setdefault(layer, len(self.seen))
            if self._chosen(layer, place):
                query, key = args[0].detach(), args[1].detach()
                given = {name: x for name, x in kwargs.items() if name not in _NOT_OF_MAPS}
                given = {name: x.detach() if isinstance(x, Tensor) else x for name, x in given.items()}
                given["enable_gqa"] = query.size(1) != key.size(1)
                with _disable_current_modes(), torch.no_grad():
                    self._observe(layer, query, key, result[_LOGSUMEXP[func]].detach(), given)
        return result


def _check_statistics(wanted: tuple[str, ...], heads: object, reduce: Reduce) -> None:
    possible = AttentionStatistics._fields
    for name in wanted:
        if name not in possible:
            raise ValueError(f"statistics names {name!r}, which is none of {', '.join(possible)}.")
        if name in _INDICES and (heads == "mean" or reduce in ("mean", "sum")):
            raise ValueError(
                f"{name} holds indices, which have no mean: record it with heads by index and reduce=None."
            )
    if isinstance(reduce, str) and reduce not in ("mean", "sum"):
        raise ValueError(f'reduce is {reduce!r}, but must be "mean", "sum", a function or None.')


def _choose_layers(layers: str | int | Sequence[str | int] | None, names: Any) -> Callable[[str, int], bool]:
    if layers is None:
        return lambda name, place: True
    wanted = [layers] if isinstance(layers, str | int) else list(layers)
    patterns = [x for x in wanted if isinstance(x, str)]
    places = {x for x in wanted if not isinstance(x, str)}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"layers names {pattern!r}, which matches no module of the model.")
    for place in places:
        if place < 0:
            raise ValueError(f"layers holds {place}, but a place in the order of the calls counts from 0.")
    return lambda name, place: place in places or any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _statistics(
    query: Tensor, key: Tensor, wanted: tuple[str, ...], given: dict[str, Any], top_k: int, mass_window: int
) -> dict[str, Tensor]:
    found = attention_statistics(
        query,
        key,
        **given,
        top_k=top_k if {"top_weights", "top_indices"} & set(wanted) else 0,
        mass_window=mass_window if "window_mass" in wanted else None,
        column_sum="column_sum" in wanted,
    )
    return {name: getattr(found, name) for name in wanted}


def _choose(name: str, x: Tensor, heads: str | Sequence[int], queries: slice | Sequence[int] | Tensor | None) -> Tensor:
    """Rows and heads of a statistic (B, Hq, L, ...) or, for column sums, (B, Hq, S)."""
    if queries is not None and name != "column_sum":
        x = x[:, :, queries]
    if isinstance(heads, str):
        return x.mean(1) if heads == "mean" else x
    return x[:, list(heads)]
