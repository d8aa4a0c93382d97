"""attention_with_weights_forward is attention and attention_weights in one walk, with the derivatives of both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_attn
from torch_attn import reference

from ..cases import CASE_BY_NAME, Case, small
from ..map_oracle import DTYPES, MAP_CASES, Results, cast, dtype_name
from ..oracle import DIFFERENTIABLE_OPTIONS, largest, max_error
from .test_fused_derivatives import LargestResult

ops = torch.ops.torch_attn
BOTH = pytest.mark.parametrize("mean", [False, True], ids=["all", "mean"])


def draw(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    query, key, value = case.tensors(dtype)
    options = case.kwargs(dtype)
    options.pop("dropout_p", None)
    return {"query": query, "key": key, "value": value, **options}


def ours(given: dict[str, Any], mean: bool) -> Results:
    return dict(
        zip(("out", "weights", "logsumexp"), ops.attention_with_weights_forward(**given, mean=mean), strict=True)
    )


def exact(given: dict[str, Any], mean: bool) -> Results:
    out, logsumexp, weights = reference.attention(**given)
    return {"out": out, "weights": weights.mean(1) if mean else weights, "logsumexp": logsumexp}


def differentiable(given: dict[str, Any]) -> list[str]:
    names = ["query", "key", "value", *DIFFERENTIABLE_OPTIONS]
    return [n for n in names if n in given and given[n].is_floating_point()]


def assert_near(actual: Results, given: dict[str, Any], mean: bool, dtype: torch.dtype) -> None:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = exact({n: cast(x, torch.float64) for n, x in given.items()}, mean)
    yardstick = exact({n: cast(x, accumulator) for n, x in given.items()}, mean)
    for name, value in actual.items():
        # AMX and vdpbf16ps take rounded weights to multiply by value, and these are as many as there are keys.
        units = 64 * torch.finfo(accumulator).eps + (2 * torch.finfo(dtype).eps if dtype != accumulator else 0.0)
        bound = 4 * max_error(yardstick[name].double(), wanted[name]) + units * max(1.0, largest(wanted[name]))
        assert max_error(value, wanted[name]) <= bound, name


@BOTH
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_output_and_weights_equal_float64(case: Case, mean: bool, isa: str, poisoned_memory: None) -> None:
    given = draw(case, torch.float32)
    assert_near(ours(given, mean), given, mean, torch.float32)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "name",
    ["long", "long_queries", "causal_long", "window", "grouped_query", "float_mask", "key_lengths", "everything"],
)
def test_every_dtype_on_every_instruction_set(
    name: str, dtype: torch.dtype, mean: bool, isa: str, poisoned_memory: None
) -> None:
    given = draw(CASE_BY_NAME[name], dtype)
    actual = ours(given, mean)
    assert actual["out"].dtype == actual["weights"].dtype == dtype
    assert_near(actual, given, mean, dtype)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("of_each_head", [False, True], ids=["shared", "of each head"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_tiles_that_a_head_does_not_attend(
    is_causal: bool, of_each_head: bool, dtype: torch.dtype, mean: bool, isa: str, poisoned_memory: None
) -> None:
    """Their weights are 0, also where weights of other heads have lain before; several tasks' rows, the last's few."""
    tiles = torch.rand(1, 3 if of_each_head else 1, 14, 5) > 0.5
    attended = tiles.repeat_interleave(32, 2).repeat_interleave(64, 3)[:, :, :430, :310]
    if not of_each_head:
        attended = attended & (torch.rand(430, 310) > 0.2)
    given: dict[str, Any] = {"query": torch.randn(1, 3, 430, 40), "key": torch.randn(1, 3, 310, 40)}
    given |= {"value": torch.randn(1, 3, 310, 72), "attn_mask": attended, "is_causal": is_causal}
    given = {n: x.to(dtype) if n in ("query", "key", "value") else x for n, x in given.items()}
    assert_near(ours(given, mean), given, mean, dtype)


@BOTH
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_gradients_through_both_add_up(case: Case, mean: bool) -> None:
    given = draw(case, torch.float64)
    names = differentiable(given)
    cotangents = {n: torch.randn_like(x) for n, x in ours(given, mean).items()}
    if case.name == "extreme_mask_rows":  # torch's derivative of a logsumexp of −1e9 is wrong
        del cotangents["logsumexp"]

    def gradients(function: Any) -> tuple[Tensor | None, ...]:
        leaves = [given[n].detach().clone().requires_grad_() for n in names]
        results = function(given | dict(zip(names, leaves, strict=True)), mean)
        loss = sum((results[n].masked_fill(results[n].isinf(), 0.0) * g).sum() for n, g in cotangents.items())
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    for name, a, b in zip(names, gradients(ours), gradients(exact), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(given[name]) if b is None else b)


@BOTH
def test_each_gradient_alone_and_none(mean: bool) -> None:
    given = {n: torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for n in ("query", "key", "value")}
    for name in ("out", "weights", "logsumexp"):
        found, wanted = (
            torch.autograd.grad(f(given, mean)[name].square().sum(), list(given.values()), allow_unused=True)
            for f in (ours, exact)
        )
        for a, b in zip(found, wanted, strict=True):
            if b is not None or a is not None:
                torch.testing.assert_close(a if a is not None else torch.zeros_like(b), b if b is not None else 0 * a)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)], ids=str)
@BOTH
def test_empty_dimensions(sizes: tuple[int, ...], mean: bool, isa: str, poisoned_memory: None) -> None:
    batch, heads, length, keys = sizes
    key = torch.randn(batch, heads, keys, 4)
    found = ours({"query": torch.randn(batch, heads, length, 4), "key": key, "value": key}, mean)
    assert (found["out"] == 0).all() and found["out"].shape == (batch, heads, length, 4)
    assert (found["logsumexp"] == -math.inf).all()
    assert found["weights"].shape == ((batch, length, keys) if mean else sizes)
    assert (found["weights"] == 0).all() or heads == 0


def test_neither_threads_nor_repetition_change_a_bit(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = {n: torch.randn(2, 3, 211, 16).to(dtype) for n in ("query", "key", "value")}
        before, found = torch.get_num_threads(), []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(ours(given | {"is_causal": True}, mean=True))
        torch.set_num_threads(before)
        assert all(torch.equal(other[n], x) for other in found[1:] for n, x in found[0].items())


def test_the_mean_holds_no_more_than_itself() -> None:
    given = {n: torch.randn(1, 8, 64, 4, requires_grad=True) for n in ("query", "key", "value")}
    with LargestResult() as results:
        found = ours(given, mean=True)
        (found["out"].sum() + found["weights"].square().sum()).backward()
    assert results.elements == 64 * 64


@BOTH
@pytest.mark.parametrize(
    "name", ["plain", "grouped_query", "float_mask_over_heads", "key_lengths", "sinks", "everything"]
)
def test_gradcheck_of_first_and_second_derivatives(name: str, mean: bool) -> None:
    given = draw(small(CASE_BY_NAME[name]), torch.float64)
    names = differentiable(given)

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        found = ours(given | dict(zip(names, leaves, strict=True)), mean)
        return tuple(x.masked_fill(x.isinf(), 0.0) for x in found.values())

    inputs = tuple(given[n].detach().clone().requires_grad_() for n in names)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "causal", "float_mask_over_heads", "key_lengths", "sinks"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    given = draw(small(CASE_BY_NAME[name]), torch.float32)
    inputs = tuple(given.pop(n).requires_grad_(requires_grad) for n in ("query", "key", "value"))
    torch.library.opcheck(ops.attention_with_weights_forward.default, inputs, given)
    torch.library.opcheck(ops.attention_with_weights_forward.default, inputs, given | {"mean": True})


def test_autocast_and_vmap() -> None:
    given = {n: torch.randn(3, 1, 2, 9, 8) for n in ("query", "key", "value")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours({n: x[0] for n, x in given.items()}, mean=True)
    assert found["out"].dtype == found["weights"].dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda q, k, v: ours({"query": q, "key": k, "value": v}, mean=True))(*given.values())
    for i in range(3):
        for name, x in ours({n: x[i] for n, x in given.items()}, mean=True).items():
            torch.testing.assert_close(mapped[name][i], x)


def test_the_module_computes_its_weights_by_it() -> None:
    module, x = torch_attn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 64, 16)
    with LargestResult() as results:
        out, weights = module(x, x, x)
    assert weights.shape == (2, 64, 64) and results.elements == weights.numel()
    wanted, wanted_weights = torch.nn.MultiheadAttention.forward(module, x, x, x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(weights, wanted_weights)
