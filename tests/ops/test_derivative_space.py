"""Numerical derivatives over a space of calls that hypothesis draws: every option, and any of them together.

The draws are derandomised, so that a failure repeats and a passing commit stays passing; the numbers in the tensors are
fresh in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

ops = torch.ops.torch_attn
Function = Callable[..., tuple[Tensor, Tensor]]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and options of one call: what is a tensor, by the sizes it has."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = kv_heads * group
    rows, keys = draw(st.integers(0, 4)), draw(st.integers(0, 5))
    dim, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    options: dict[str, Any] = {}

    def maybe(name: str, strategy: st.SearchStrategy) -> None:
        if draw(st.booleans()):
            options[name] = draw(strategy)

    maybe("is_causal", st.just(True))
    maybe("window_left", st.integers(0, 4))
    maybe("window_right", st.integers(0, 4))
    maybe("causal_alignment", st.just("bottom_right"))
    maybe("scale", st.floats(-1, 1))
    maybe("softcap", st.floats(1, 4))
    maybe("dropout_p", st.floats(0.1, 0.8))
    maybe("key_lengths", st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
    mask_sizes = st.tuples(*(st.sampled_from((1, n)) for n in (batch, heads, rows, keys)))
    maybe("attn_mask", st.tuples(st.sampled_from(("bool", "float", "float with -inf")), mask_sizes))
    maybe("alibi_slopes", st.sampled_from(((heads,), (batch, heads))))
    maybe("sinks", st.just((heads,)))
    sizes = {
        "query": (batch, heads, rows, dim),
        "key": (batch, kv_heads, keys, dim),
        "value": (batch, kv_heads, keys, value_dim),
    }
    return {"sizes": sizes, "options": options}


def as_function(call: dict[str, Any]) -> tuple[Function, list[Tensor]]:
    """The call as a function of its differentiable tensors, and these."""
    options = dict(call["options"])
    tensors = {n: torch.randn(sizes, dtype=torch.float64) for n, sizes in call["sizes"].items()}
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"])
    if "attn_mask" in options:
        kind, sizes = options.pop("attn_mask")
        blocked = torch.rand(sizes) > 0.7
        if kind == "bool":
            options["attn_mask"] = ~blocked
        else:
            tensors["attn_mask"] = torch.randn(sizes, dtype=torch.float64)
        if kind == "float with -inf":  # no numerical derivative: infinity moved by a little is infinity
            options["attn_mask"] = tensors.pop("attn_mask").masked_fill(blocked, -math.inf)
    for name in ("alibi_slopes", "sinks"):
        if name in options:
            tensors[name] = torch.randn(options.pop(name), dtype=torch.float64)
    rng_state = torch.tensor([int(torch.randint(2**31, ())), 0, 0])
    names = list(tensors)

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, args, strict=True))
        out, logsumexp, _ = ops.attention_forward(**named, **options, rng_state=rng_state)
        return out, logsumexp.masked_fill(logsumexp.isinf(), 0.0)  # a row with no key has no gradient

    return function, [x.requires_grad_() for x in tensors.values()]


def drawn(examples: int) -> Callable[[Callable], Callable]:
    """Hypothesis without its clock and its database: on a busy machine nothing but the answers decides."""
    limits = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: limits(given(call=calls())(test))


@drawn(50)
def test_first_derivatives(call: dict[str, Any]) -> None:
    """Backward, also batched and with gradients that are undefined, and forward mode.

    Forward mode is batched by torch.func (test_vmap.py). gradcheck's own batching of it takes only operators whose
    output does not come from the call that computes the tangent.
    """
    function, inputs = as_function(call)
    checks = {"check_batched_grad": True, "check_undefined_grad": True}
    assert gradcheck(function, inputs, **checks, check_forward_ad=True, check_batched_forward_grad=False)


@drawn(50)
def test_second_derivatives(call: dict[str, Any]) -> None:
    """Reverse over reverse, also batched and with undefined gradients, and forward over reverse."""
    function, inputs = as_function(call)
    checks = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "check_batched_grad": True}
    assert gradgradcheck(function, inputs, **checks, check_undefined_grad=True)
