"""How the tests judge a kernel: one call forward and backward, in float64 and in the dtype's own plain torch math."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_attn import reference

DIFFERENTIABLE_OPTIONS = ("attn_mask", "alibi_slopes", "sinks")


@dataclass
class Call:
    """Inputs of one attention call; ``options`` holds every keyword, tensors included."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    grad_out: Tensor
    grad_logsumexp: Tensor | None

    def to(self, dtype: torch.dtype) -> Call:
        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        options = {name: cast(x) for name, x in self.options.items()}
        return Call(
            *map(cast, (self.query, self.key, self.value)), options, cast(self.grad_out), cast(self.grad_logsumexp)
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key": self.key, "value": self.value}
        for name in DIFFERENTIABLE_OPTIONS:
            x = self.options.get(name)
            if x is not None and x.is_floating_point():
                named[name] = x
        return named


def backward(call: Call, leaves: dict[str, Tensor], out: Tensor, logsumexp: Tensor) -> dict[str, Tensor]:
    loss = (out * call.grad_out.to(out.dtype)).sum()
    if call.grad_logsumexp is not None:  # a row with nothing to attend has logsumexp −inf and no gradient from it
        finite = logsumexp.isfinite()
        loss = loss + (logsumexp.masked_fill(~finite, 0.0) * call.grad_logsumexp.to(logsumexp.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}


def run_reference(call: Call, keep_mask: Tensor | None) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in call.leaves().items()}
    options = call.options | {n: x for n, x in leaves.items() if n in DIFFERENTIABLE_OPTIONS}
    out, logsumexp, _ = reference.attention(
        leaves["query"], leaves["key"], leaves["value"], **options, keep_mask=keep_mask
    )
    return {"out": out.detach(), "logsumexp": logsumexp.detach()} | backward(call, leaves, out, logsumexp)


def run_kernel(call: Call) -> tuple[dict[str, Tensor], Tensor | None]:
    """Our operators, forward and backward. Also returns the dropout mask the call drew, if any."""
    leaves = {name: x.detach().requires_grad_() for name, x in call.leaves().items()}
    options = call.options | {n: x for n, x in leaves.items() if n in DIFFERENTIABLE_OPTIONS}
    out, logsumexp, rng_state = torch.ops.torch_attn.attention_forward(
        leaves["query"], leaves["key"], leaves["value"], **options
    )
    keep = None
    if call.options.get("dropout_p", 0.0) > 0:
        sizes = (*call.query.shape[:3], call.key.size(2))
        keep = torch.ops.torch_attn.dropout_keep_mask(rng_state, *sizes, call.options["dropout_p"])
    return {"out": out.detach(), "logsumexp": logsumexp.detach()} | backward(call, leaves, out, logsumexp), keep


def max_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinities must agree in place and sign, and NaN is never right."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    actual, infinite = actual.double(), exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), "infinities differ"
    difference = (actual - exact)[~infinite].abs()
    assert not difference.isnan().any(), "NaN"
    return difference.max().item() if difference.numel() else 0.0


def assert_as_accurate_as_torch(call: Call, forward_factor: float, gradient_factor: float) -> None:
    """Every output's error against float64 is within a factor of what plain torch math in the same dtype does.

    For bfloat16 and float16, torch's math path computes in float32 and rounds its results, so that is the yardstick.
    """
    dtype = call.query.dtype
    actual, keep = run_kernel(call)
    exact = run_reference(call.to(torch.float64), keep)
    plain = run_reference(call.to(dtype if dtype == torch.float64 else torch.float32), keep)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        rounded = plain[name].to(value.dtype)
        factor = gradient_factor if name.startswith("grad") else forward_factor
        # Where torch's own error happens to vanish, a few units in the last place of the accumulator are granted.
        finite = exact[name][exact[name].isfinite()]
        magnitude = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        floor = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * magnitude
        bound = factor * max_error(rounded, exact[name]) + floor
        error = max_error(value, exact[name])
        assert error <= bound, f"{name}: error {error:.3g} exceeds {factor} x torch's {max_error(rounded, exact[name]):.3g}"
