"""torch.func.vmap folds the mapped dimension into the batch: one fused kernel, no loop, no warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from torch_attn import reference

from ..cases import CASE_BY_NAME, Case, small

ops = torch.ops.torch_attn
MAPPED = 3
TENSOR_OPTIONS = ("attn_mask", "alibi_slopes", "sinks", "key_lengths")
NAMES = ["plain", "grouped_query", "float_mask", "float_mask_over_batch", "key_lengths", "alibi_bottom_right", "sinks"]


@pytest.fixture(autouse=True)
def no_fallback() -> Any:
    """vmap's slow fallback, which loops, warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*vmap.*")
        yield


def arguments(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    options = case.kwargs(torch.float64)
    tensors = dict(zip(("query", "key", "value"), case.tensors(torch.float64), strict=True))
    tensors |= {n: options.pop(n) for n in TENSOR_OPTIONS if n in options}
    return tensors, options


def ours(options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda **tensors: ops.attention(**tensors, **options, enable_gqa=True)


def one_by_one(function: Callable[..., Any], tensors: dict[str, Tensor], dims: dict[str, int | None]) -> Any:
    def sample(i: int) -> Any:
        return function(**{n: x if dims[n] is None else x.select(dims[n], i) for n, x in tensors.items()})

    samples = [sample(i) for i in range(MAPPED)]
    return torch.utils._pytree.tree_map(lambda *xs: torch.stack(xs), *samples)


def by_name(function: Callable[..., Any], names: list[str], *values: Tensor) -> Any:
    return function(**dict(zip(names, values, strict=True)))


def mapped_in_turn(case: Case) -> list[dict[str, int | None]]:
    """Everything mapped, and each tensor mapped alone, in dimensions that differ."""
    tensors, _ = arguments(case)
    alone = [{n: (0 if n == name else None) for n in tensors} for name in tensors]
    return [{n: i % x.dim() for i, (n, x) in enumerate(tensors.items())}, *alone]


def stacked(tensors: dict[str, Tensor], dims: dict[str, int | None]) -> dict[str, Tensor]:
    def variant(x: Tensor, i: int) -> Tensor:
        return (x - i).clamp(min=0) if x.dtype == torch.int64 else torch.randn_like(x)

    return {
        n: x if dims[n] is None else torch.stack([variant(x, i) for i in range(MAPPED)], dims[n])
        for n, x in tensors.items()
    }


@pytest.mark.parametrize("case", [small(CASE_BY_NAME[n]) for n in NAMES], ids=str)
def test_forward_with_any_in_dims(case: Case) -> None:
    tensors, options = arguments(case)
    names = list(tensors)
    for dims in mapped_in_turn(case):
        inputs = stacked(tensors, dims)
        function = ours(options)
        calls = ops.kernel_calls()
        by_position = functools.partial(by_name, function, names)
        actual = vmap(by_position, tuple(dims[n] for n in names))(*(inputs[n] for n in names))
        assert ops.kernel_calls() == calls + 1
        torch.testing.assert_close(actual, one_by_one(function, inputs, dims))


@pytest.mark.parametrize("case", [small(CASE_BY_NAME[n]) for n in NAMES], ids=str)
def test_per_sample_gradients_of_mapped_and_shared_inputs(case: Case) -> None:
    tensors, options = arguments(case)
    names = [n for n in tensors if n != "key_lengths"]
    rest = {n: tensors[n] for n in tensors if n == "key_lengths"}

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        def loss(*a: Tensor) -> Tensor:
            return ours(options)(**dict(zip(names, a, strict=True)), **rest).square().sum()

        return grad(loss, tuple(range(len(names))))(*inputs)

    for dims in mapped_in_turn(case):
        chosen = {n: dims[n] for n in names}
        if all(d is None for d in chosen.values()):
            continue
        inputs = stacked({n: tensors[n] for n in names}, chosen)
        calls = ops.kernel_calls()
        actual = vmap(gradients, tuple(chosen[n] for n in names))(*(inputs[n] for n in names))
        assert ops.kernel_calls() == calls + 1
        wanted = one_by_one(lambda **t: gradients(*(t[n] for n in names)), inputs, chosen)
        torch.testing.assert_close(actual, wanted)


def test_forward_mode_under_vmap_and_vmap_under_forward_mode() -> None:
    inputs = [torch.randn(MAPPED, 2, 2, 5, 3, dtype=torch.float64) for _ in range(6)]
    primals, tangents = tuple(inputs[:3]), tuple(inputs[3:])

    def directional(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *a: jvp(function, a[:3], a[3:])

    plain = lambda *a: reference.attention(*a)[0]  # noqa: E731
    torch.testing.assert_close(vmap(directional(ops.attention))(*inputs), vmap(directional(plain))(*inputs))
    torch.testing.assert_close(jvp(vmap(ops.attention), primals, tangents), jvp(vmap(plain), primals, tangents))


def test_two_levels_of_vmap() -> None:
    inputs = [torch.randn(2, MAPPED, 2, 2, 5, 3, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(vmap(vmap(ops.attention))(*inputs), ops.attention(*inputs))


class TestDropout:
    def inputs(self) -> list[Tensor]:
        query = torch.randn(2, 2, 9, 4, dtype=torch.float64)
        return [torch.stack([query] * MAPPED) for _ in range(3)]

    def test_error_mode_refuses(self) -> None:
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(lambda *a: ops.attention(*a, dropout_p=0.5))(*self.inputs())

    def test_same_and_different_mean_what_they_say(self) -> None:
        function = lambda *a: ops.attention(*a, dropout_p=0.5)  # noqa: E731
        same = vmap(function, randomness="same")(*self.inputs())
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        different = vmap(function, randomness="different")(*self.inputs())
        assert not torch.equal(different[0], different[1])

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_backward_replays_the_forward_bits(self, randomness: str) -> None:
        """value's gradient has the pattern of kept weights, which the output of an identity value shows."""
        query = torch.zeros(MAPPED, 1, 1, 6, 2, dtype=torch.float64)
        identity = torch.eye(6, dtype=torch.float64).expand(MAPPED, 1, 1, 6, 6)

        def out_and_gradient(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, pull = torch.func.vjp(lambda x: ops.attention(q, q, x, dropout_p=0.5), v)
            return out, pull(torch.eye(6, dtype=torch.float64)[None, None])[0]

        out, gradient = vmap(out_and_gradient, randomness=randomness)(query, identity)
        torch.testing.assert_close(gradient, out.mT)

    def test_a_batched_backward_replays_an_unmapped_forward(self) -> None:
        leaves = [torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        out = ops.attention(*leaves, dropout_p=0.5)
        cotangents = torch.randn(MAPPED, *out.shape, dtype=torch.float64)
        batched = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
        for i in range(MAPPED):
            for a, b in zip(batched, torch.autograd.grad(out, leaves, cotangents[i], retain_graph=True), strict=True):
                torch.testing.assert_close(a[i], b)
