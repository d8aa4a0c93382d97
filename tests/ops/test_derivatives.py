"""Derivatives of every kind, of every option: gradcheck, second order, forward mode, and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from torch_attn import reference

from ..cases import CASE_BY_NAME, Case, small
from ..oracle import DIFFERENTIABLE_OPTIONS

ops = torch.ops.torch_attn

NAMES = [
    "plain",
    "heads_inside",
    "causal_more_keys",
    "bottom_right_empty_rows",
    "window",
    "grouped_query",
    "bool_mask_empty_rows",
    "float_mask",
    "float_mask_over_heads",
    "float_mask_over_rows",
    "key_lengths",
    "alibi_bottom_right",
    "softcap",
    "sinks",
    "dropout",
    "everything",
]
SMALL_CASES = [small(CASE_BY_NAME[name]) for name in NAMES]
Function = Callable[..., tuple[Tensor, Tensor]]


def as_function(case: Case) -> tuple[Function, tuple[Tensor, ...]]:
    """The case as a function of its differentiable tensors; logsumexp's −inf rows, which have no gradient, read 0."""
    options: dict[str, Any] = case.kwargs(torch.float64) | {"enable_gqa": True}
    tensors = dict(zip(("query", "key", "value"), case.tensors(torch.float64), strict=True))
    for name in DIFFERENTIABLE_OPTIONS:
        x = options.get(name)
        if x is not None and x.is_floating_point():
            tensors[name] = options.pop(name)
    names = list(tensors)

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        if "dropout_p" in options:
            torch.manual_seed(17)  # the same bits at every evaluation
        out, logsumexp = ops.attention_with_logsumexp(**dict(zip(names, args, strict=True)), **options)
        return out, logsumexp.masked_fill(logsumexp.isinf(), 0.0)

    return function, tuple(x.detach().clone().requires_grad_() for x in tensors.values())


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradcheck_backward_and_forward_mode(case: Case) -> None:
    function, inputs = as_function(case)
    # Batched gradients run the backward under vmap, where randomness must be declared.
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad="dropout_p" not in case.options)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradgradcheck(case: Case) -> None:
    function, inputs = as_function(case)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_composite_and_kernel_agree(case: Case) -> None:
    """torch.func takes the composite path; plain autograd the kernel."""
    function, inputs = as_function(case)

    def loss(*args: Tensor) -> Tensor:
        out, logsumexp = function(*args)
        return out.square().sum() + logsumexp.sin().sum()

    wanted = torch.autograd.grad(loss(*inputs), inputs)
    actual = grad(loss, tuple(range(len(inputs))))(*(x.detach() for x in inputs))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)


def qkv(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(3)]


def ours(*args: Tensor) -> Tensor:
    return ops.attention(*args, is_causal=True)


def plain(*args: Tensor) -> Tensor:
    return reference.attention(*args, is_causal=True)[0]


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0), (2, 2, None)], ids=str)
def test_vmap_maps_any_dimension(in_dims: tuple[int | None, ...]) -> None:
    inputs = [torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3)]
    batched = [x if d is None else torch.stack([x, 2 * x, -x], d) for x, d in zip(inputs, in_dims, strict=True)]
    torch.testing.assert_close(vmap(ours, in_dims)(*batched), vmap(plain, in_dims)(*batched))


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
def test_jacobians_and_hessians(transform: Callable) -> None:
    query, key, value = qkv(1, 2, 3, 2)
    squared = lambda f: lambda *a: f(*a).square().sum((0, 1, 2))  # noqa: E731
    actual = transform(squared(ours), argnums=(0, 1, 2))(query, key, value)
    wanted = transform(squared(plain), argnums=(0, 1, 2))(query, key, value)
    torch.testing.assert_close(actual, wanted)


def test_jvp_and_vjp() -> None:
    inputs, tangents = tuple(qkv(2, 2, 5, 3)), tuple(qkv(2, 2, 5, 3))
    torch.testing.assert_close(jvp(ours, inputs, tangents), jvp(plain, inputs, tangents))
    (out, pull), (expected, pull_expected) = vjp(ours, *inputs), vjp(plain, *inputs)
    torch.testing.assert_close(pull(out), pull_expected(expected))


def test_per_sample_gradients() -> None:
    inputs = qkv(3, 1, 2, 5, 4)
    per_sample = vmap(grad(lambda *a: ours(*a).square().sum(), (0, 1, 2)))(*inputs)
    wanted = vmap(grad(lambda *a: plain(*a).square().sum(), (0, 1, 2)))(*inputs)
    torch.testing.assert_close(per_sample, wanted)


def test_gradient_of_a_gradient_penalty() -> None:
    def penalty(f: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    inputs = qkv(2, 2, 9, 4)
    torch.testing.assert_close(penalty(ours, inputs), penalty(plain, inputs))


def test_functional_call_in_inference_mode() -> None:
    module = torch.nn.Linear(4, 4, dtype=torch.float64)
    query, key, value = qkv(1, 2, 5, 4)
    with torch.inference_mode():
        parameters = {"weight": torch.eye(4).double(), "bias": torch.zeros(4).double()}
        projected = functional_call(module, parameters, (query,))
        torch.testing.assert_close(ours(projected, key, value), plain(query, key, value))
