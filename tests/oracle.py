"""How the tests judge a kernel: one call forward and backward, in float64 and in the dtype's own plain torch math."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_attn import reference

DIFFERENTIABLE_OPTIONS = ("attn_mask", "alibi_slopes", "sinks")
TF32_EPS = 2.0**-10


@dataclass
class Call:
    """Inputs of one attention call; ``options`` holds every keyword, tensors included."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    grad_out: Tensor | None  # None: a call that has no gradients
    grad_logsumexp: Tensor | None

    def mapped(self, function: Callable[[Any], Any]) -> Call:
        """The same call of other tensors."""
        options = {name: function(x) for name, x in self.options.items()}
        names = ("query", "key", "value", "grad_out", "grad_logsumexp")
        return dataclasses.replace(self, **{n: function(getattr(self, n)) for n in names}, options=options)

    def to(self, dtype: torch.dtype) -> Call:
        return self.mapped(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x)

    def longest_key(self) -> int:
        return self.key.size(2)

    def reference(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], keep_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and logsumexp by the definition."""
        return reference.attention(query, key, value, **options, keep_mask=keep_mask)[:2]

    def kernel(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output and logsumexp of our operators, and the dropout mask that the call drew, if any."""
        out, logsumexp, rng_state = torch.ops.torch_attn.attention_forward(query, key, value, **options)
        keep = None
        if (p := options.get("dropout_p", 0.0)) > 0:
            keep = torch.ops.torch_attn.dropout_keep_mask(rng_state, *query.shape[:3], key.size(2), p)
        return out, logsumexp, keep

    def leaves(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key": self.key, "value": self.value}
        for name in DIFFERENTIABLE_OPTIONS:
            x = self.options.get(name)
            if x is not None and x.is_floating_point():
                named[name] = x
        return named


def backward(call: Call, leaves: dict[str, Tensor], out: Tensor, logsumexp: Tensor) -> dict[str, Tensor]:
    if call.grad_out is None:
        return {}
    loss = (out * call.grad_out.to(out.dtype)).sum()
    if call.grad_logsumexp is not None:  # a row with nothing to attend has logsumexp −inf and no gradient from it
        finite = logsumexp.isfinite()
        loss = loss + (logsumexp.masked_fill(~finite, 0.0) * call.grad_logsumexp.to(logsumexp.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}


def differentiable_inputs(call: Call) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The call's leaves, requiring grad, and query, key, value and the options made of them."""
    leaves = {name: x.detach().clone().requires_grad_(call.grad_out is not None) for name, x in call.leaves().items()}
    options = call.options | {n: x for n, x in leaves.items() if n in DIFFERENTIABLE_OPTIONS}
    return leaves, (leaves["query"], leaves["key"], leaves["value"], options)


def run_reference(call: Call, keep_mask: Tensor | None) -> dict[str, Tensor]:
    leaves, inputs = differentiable_inputs(call)
    out, logsumexp = call.reference(*inputs, keep_mask)
    return {"out": out.detach(), "logsumexp": logsumexp.detach()} | backward(call, leaves, out, logsumexp)


def run_kernel(call: Call) -> tuple[dict[str, Tensor], Tensor | None]:
    """Our operators, forward and backward. Also returns the dropout mask the call drew, if any."""
    leaves, inputs = differentiable_inputs(call)
    out, logsumexp, keep = call.kernel(*inputs)
    return {"out": out.detach(), "logsumexp": logsumexp.detach()} | backward(call, leaves, out, logsumexp), keep


def neighbour(call: Call, eps: float = 0.0) -> Call:
    """The same call with each input off by a few units in the last place: as well conditioned, rounded otherwise. eps:
    of what products round their operands to, if that is more."""

    def nudge(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        nudged = x * (1 + 8 * max(eps, torch.finfo(x.dtype).eps) * (torch.rand_like(x) - 0.5))
        return torch.where(nudged.isfinite(), nudged, x)

    return call.mapped(nudge)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits of mantissa: to nearest, ties away from zero, as cvt.rna.tf32 rounds."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), x)


class RoundedProducts(TorchDispatchMode):
    """Rounds the operands of every float32 matrix product, as a GPU does where TF32 is allowed; backward's, too."""

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __init__(self, rounded: Callable[[Tensor], Tensor] = rounded_to_tf32) -> None:
        super().__init__()
        self.rounded = rounded

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in self.PRODUCTS:
            args = tuple(self.rounded(x) if x.dtype == torch.float32 else x for x in args)
        return func(*args, **(kwargs or {}))


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinities must agree in place and sign, and NaN is never right."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    actual, infinite = actual.double(), exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), "infinities differ"
    difference = (actual - exact)[~infinite].abs()
    assert not difference.isnan().any(), "NaN"
    return difference.max().item() if difference.numel() else 0.0


def largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


@dataclass
class Yardstick:
    """Plain torch math: the exact results, and how far its own precision takes it from them."""

    keep_mask: Tensor | None
    rounds_weights: bool
    tf32: bool
    dtypes: dict[str, torch.dtype]  # those that results are returned in

    def measure(self, call: Call) -> tuple[dict[str, Tensor], dict[str, float]]:
        dtype = call.query.dtype
        accumulator = accumulator_of(dtype)
        exact = run_reference(call.to(torch.float64), self.keep_mask)
        with RoundedProducts() if self.tf32 else contextlib.nullcontext():
            in_accumulator = run_reference(call.to(accumulator), self.keep_mask)
        in_dtype = run_reference(call, self.keep_mask) if dtype != accumulator else in_accumulator
        errors = {}
        for name, value in exact.items():
            in_own_dtype = name.startswith("grad") or (name == "out" and self.rounds_weights)
            rounded = (in_dtype if in_own_dtype else in_accumulator)[name].to(self.dtypes[name])
            errors[name] = max_error(rounded, value)
        return exact, errors

    def measure_around(self, call: Call) -> dict[str, float]:
        """The largest errors in eight calls like this one: in one alone, errors may happen to cancel."""
        measured = [self.measure(neighbour(call, TF32_EPS if self.tf32 else 0.0))[1] for _ in range(8)]
        return {name: max(errors[name] for errors in measured) for name in measured[0]}


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_accurate(
    call: Call,
    actual: dict[str, Tensor],
    keep_mask: Tensor | None,
    *,
    forward_factor: float = 2,
    gradient_factor: float = 3,
    rounds_weights: bool = False,
    tf32: bool = False,
) -> None:
    """Every result's error against float64 is within a factor of what plain torch math does in the same dtype.

    For bfloat16 and float16 the yardstick of out and logsumexp is torch's math computed in float32 and rounded at the
    end, as SDPA's math path does; that of gradients is torch's math in the dtype itself, FlashAttention's convention:
    a backward that reads the rounded output cannot be held to the former. Kernels of which ``rounds_weights`` is true,
    since their matrix instructions take weights of 16 bits, are judged by the latter forward, too. With ``tf32`` the
    yardstick is torch's math in float32 with the operands of its products rounded to TF32. Where the
    yardstick's own error happens to vanish, a few units in the last place of the accumulator are granted; in float64
    there is no yardstick but these. A gradient that sums over many rows, ALiBi's with the distances as factors, is
    granted what rounding each row's output adds up to at random. An output of rounded weights is judged by half a unit
    in its last place at least: torch's errs by less where weights are 0 and 1, as its largest weight is 1 exactly. All
    that follows from rounded weights is granted what a large logsumexp's last place is, up to the dtype's own.

    One measurement of the yardstick is a matter of luck in small calls, so a result that exceeds it is judged by the
    largest of several. Thousands of such comparisons, on numbers drawn anew in each run, leave no false alarm.
    """
    dtype = call.query.dtype
    accumulator = accumulator_of(dtype)
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps if dtype != accumulator else 0.0
    yardstick = Yardstick(keep_mask, rounds_weights, tf32, {name: x.dtype for name, x in actual.items()})
    exact, torchs = yardstick.measure(call)
    assert actual.keys() == exact.keys()

    def bound(name: str) -> float:
        units = (64 if accumulator == torch.float64 else 16) * torch.finfo(accumulator).eps
        granted = units * max(1.0, largest(exact[name]))
        if name.removeprefix("grad_") in DIFFERENTIABLE_OPTIONS:
            rows_summed = max(1.0, actual["logsumexp"].numel() / max(1, actual[name].numel()))
            distance = call.longest_key() if name == "grad_alibi_slopes" else 1
            rounding = units + (eps if rows_summed > 1 else 0.0)
            granted += 3 * rounding * math.sqrt(rows_summed) * distance  # three standard deviations
        factor = gradient_factor if name.startswith("grad") else forward_factor
        least = 0.0
        if rounds_weights and dtype != accumulator:
            granted += min(eps, torch.finfo(accumulator).eps * largest(exact["logsumexp"])) * largest(exact[name])
            least = eps / 2 * largest(exact[name]) if name == "out" else 0.0
        return factor * max(torchs[name], least) + granted

    errors = {name: max_error(value, exact[name]) for name, value in actual.items()}
    if any(error > bound(name) for name, error in errors.items()):
        around = yardstick.measure_around(call)
        torchs = {name: max(error, around[name]) for name, error in torchs.items()}
    for name, error in errors.items():
        message = f"{name}: error {error:.3g} exceeds {bound(name):.3g}, torch's is {torchs[name]:.3g}"
        assert error <= bound(name), message


def assert_kernel_accurate(call: Call) -> None:
    """The operators of the library, on the instruction set that is active."""
    assert_accurate(call, *run_kernel(call), rounds_weights=torch.ops.torch_attn.cpu_isa() in ("avx512_bf16", "amx"))
