"""Batching rules: under torch.func.vmap the mapped dimension becomes part of the batch, so that the kernels stay fused.

Imported by the package for its effect: it registers a rule for each operator that has kernels. The operators users call
(``attention``, ``scaled_dot_product_attention``) decompose into these under vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

_ops = torch.ops.torch_attn
_library = torch.library.Library("torch_attn", "IMPL")

_STATISTICS = ("logsumexp", "entropy", "max_weight", "argmax", "mean_distance", "window_mass")
_STATISTICS = (*_STATISTICS, "top_weights", "top_indices", "column_sum")
_OPTIONS = ("attn_mask", "alibi_slopes", "sinks")
_BY_BATCH = (
    *("query", "key", "value", "grad_out", "grad_logsumexp", "out", "logsumexp", "key_lengths"),
    *("indices", "weights", "grad_scores", "grad_log_prob"),
    *("tangent_query", "tangent_key", "tangent_value", "tangent_out", "tangent_logsumexp"),
    *("tangent_grad_out", "tangent_grad_logsumexp"),
    *(n for name in _STATISTICS[1:] for n in (name, f"grad_{name}")),
    "grad_weights",
)
_Outputs = list[tuple[Tensor, int | None]]


class _Call:
    """One operator call under vmap: its arguments by name, and which of them are mapped."""

    def __init__(self, op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], level: int) -> None:
        self.op = op
        self.arguments: dict[str, Any] = {a.name: a.default_value for a in op._schema.arguments}
        self.arguments |= dict(zip(self.arguments, args, strict=False)) | kwargs
        # What a backward operator returns, in the order of its output_mask.
        self.gradients = [r.name.removeprefix("grad_") for r in op._schema.returns]
        self.mapped: set[str] = set()
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                tensor, dim = _unwrap_batched(value, level)
                if dim is not None:
                    self.mapped.add(name)
                    tensor = tensor.movedim(dim, 0)
                self.arguments[name] = tensor

    def fold(self, size: int, randomness: str) -> None:
        """Make ordinary arguments, of a batch ``size`` times as large, of the mapped ones."""
        for option in ("cu_seqlens_q", "block_table"):
            if self.arguments.get(option) is not None:
                raise RuntimeError(
                    f"vmap: attention with {option} cannot be mapped: add the mapped entries to its sequences instead."
                )
        name = "query" if "query" in self.arguments else "value"
        self.size = size
        self.batch = self.arguments[name].size(1 if name in self.mapped else 0)
        self.shapes = {n: x.shape[1:] if n in self.mapped else x.shape for n, x in self.tensors().items()}
        if "query_rows" in self.mapped:
            raise RuntimeError(
                "vmap: attention_weights takes one choice of queries for all entries, but queries is mapped."
            )
        wanted = dict(zip(self.gradients, self.arguments.get("output_mask", ()), strict=False))
        self._fold_random_bits(randomness)
        for name in _BY_BATCH:
            if isinstance(self.arguments.get(name), Tensor):
                self.arguments[name] = self._with_map(name).flatten(0, 1)
        for name in _OPTIONS:
            pair = [n for n in (name, f"tangent_{name}") if isinstance(self.arguments.get(n), Tensor)]
            apart = wanted.get(name, False) or any(n in self.mapped for n in pair)
            for n in pair:
                self.arguments[n] = self._fold_option(n, apart)

    def tensors(self) -> dict[str, Tensor]:
        return {n: x for n, x in self.arguments.items() if isinstance(x, Tensor)}

    def _with_map(self, name: str) -> Tensor:
        x = self.arguments[name]
        return x if name in self.mapped else x.unsqueeze(0).expand(self.size, *x.shape)

    def _fold_option(self, name: str, apart: bool) -> Tensor:
        """A mask, slopes or sinks: kept as one for all entries unless the entries must be told ``apart``."""
        has_batch = len(self.shapes[name]) in (2, 4)
        is_shared = not has_batch or (self.shapes[name][0] == 1 and len(self.shapes[name]) == 4)
        if is_shared and not apart:
            return self.arguments[name]
        x = self._with_map(name)
        if not has_batch:
            x = x.unsqueeze(1)
        return x.expand(self.size, self.batch, *x.shape[2:]).flatten(0, 1)

    def _fold_random_bits(self, randomness: str) -> None:
        """The bits belong to a batch entry: tell the kernels which entries of the larger batch share them."""
        state = self.arguments.get("rng_state")
        if not (self.arguments.get("dropout_p", 0.0) > 0 or self.arguments.get("sample", False)):
            if "rng_state" in self.mapped:
                self.arguments["rng_state"] = state[0]
            return
        if state is None:
            if randomness == "error":
                raise RuntimeError(
                    "vmap: attention that draws random bits (dropout_p > 0, or sampled keys) was called in randomness "
                    "error mode. Pass randomness='same' or randomness='different' to vmap, or keep it out of vmap."
                )
            seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=self.arguments["query"].device)
            state = torch.nn.functional.pad(seed, (0, 2))
            folded_before = randomness == "different"
        else:  # drawn by an earlier call: mapped if that call was folded like this one
            folded_before = "rng_state" in self.mapped
            state = state[0] if folded_before else state
        if not folded_before:
            period = torch.where(state[2:] > 0, state[2:], self.batch)
            state = torch.cat([state[:2], period])
        self.arguments["rng_state"] = state

    def unfold(self, output: Tensor) -> tuple[Tensor, int]:
        return output.unflatten(0, (self.size, self.batch)), 0

    def unfold_gradient(self, name: str, gradient: Tensor) -> tuple[Tensor, int | None]:
        if gradient.dim() == 1 and gradient.numel() == 0:  # not wanted
            return gradient, None
        gradient, dim = self.unfold(gradient)
        if len(self.shapes[name]) == 1:
            gradient = gradient.sum(1)
        elif self.shapes[name][0] != self.batch:
            gradient = gradient.sum(1, keepdim=True)
        return gradient, dim


def _below_vmap() -> Any:
    """Excludes vmap's two keys: that of mapped tensors, and that of random operators, whose draws it maps as well."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
    return torch._C._ExcludeDispatchKeyGuard(keys | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode))


def _forward(call: _Call) -> _Outputs:
    *results, rng_state = call.op(**call.arguments)
    return [*map(call.unfold, results), (rng_state.expand(call.size, -1), 0)]


def _gather(call: _Call) -> _Outputs:
    return [call.unfold(call.op(**call.arguments))]


def _jvp(call: _Call) -> _Outputs:
    return [call.unfold(x) for x in call.op(**call.arguments)]


def _backward(call: _Call) -> _Outputs:
    return [call.unfold_gradient(n, g) for n, g in zip(call.gradients, call.op(**call.arguments), strict=True)]


def _statistics(call: _Call) -> _Outputs:
    # A statistic that was not asked for has no dimension to unfold.
    return [(x, None) if x.dim() == 1 else call.unfold(x) for x in call.op(**call.arguments)]


def _register(name: str, rule: Callable[[_Call], _Outputs]) -> None:
    op = getattr(_ops, name).default

    def kernel(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        call = _Call(op, args, kwargs, level)
        with _below_vmap():
            call.fold(interpreter.batch_size(), interpreter.randomness())
            outputs = rule(call)
        results = tuple(x if dim is None else _add_batch_dim(x, dim, level) for x, dim in outputs)
        return results if len(op._schema.returns) > 1 else results[0]

    _library.impl(name, kernel, "FuncTorchBatched")


def _dropout_keep_mask(rng_state: Tensor, *sizes_and_p: Any) -> Tensor:
    """One mask per state; a state that a folded call returned is the same for all, with the map inside the batch."""
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    state, dim = _unwrap_batched(rng_state, level)
    batch, *rest = sizes_and_p
    with _below_vmap():
        size = interpreter.batch_size()
        keep = _ops.dropout_keep_mask(state.movedim(dim, 0)[0], size * batch, *rest).unflatten(0, (size, batch))
    return _add_batch_dim(keep, 0, level)


for _name, _rule in {
    "attention_forward": _forward,
    "attention_backward": _backward,
    "attention_jvp": _jvp,
    "attention_backward_jvp": _backward,
    "attention_statistics_forward": _statistics,
    "attention_statistics_backward": _backward,
    "attention_weights_forward": _jvp,
    "attention_with_weights_forward": _jvp,
    "attention_weights_backward": _backward,
    "select_keys": _forward,
    "select_keys_backward": _backward,
    "gather_values": _gather,
    "gather_values_backward": _backward,
}.items():
    _register(_name, _rule)
_library.impl("dropout_keep_mask", _dropout_keep_mask, "FuncTorchBatched")
