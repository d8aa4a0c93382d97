"""First and second derivatives of every kind stay in the kernels: no operator returns anything of the scores' size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_attn import reference

ops = torch.ops.torch_attn
LENGTH, DIM = 96, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_softcap_dropout": {"is_causal": True, "softcap": 3.0, "dropout_p": 0.2},
}


class LargestResult(TorchDispatchMode):
    """Remembers the most elements that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def inputs(count: int = 3) -> list[Tensor]:
    return [torch.randn(1, 2, LENGTH, DIM, dtype=torch.float64) for _ in range(count)]


def loss_of(options: dict[str, Any]) -> Callable[..., Tensor]:
    def loss(*args: Tensor) -> Tensor:
        torch.manual_seed(5)
        out, logsumexp = ops.attention_with_logsumexp(*args, **options)
        return out.square().sum() + logsumexp.sin().sum()

    return loss


def forward_mode(options: dict[str, Any]) -> None:
    with fwAD.dual_level():
        duals = [fwAD.make_dual(x, t) for x, t in zip(inputs(), inputs(), strict=True)]
        assert fwAD.unpack_dual(loss_of(options)(*duals)).tangent is not None


def double_backward(options: dict[str, Any]) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    first = torch.autograd.grad(loss_of(options)(*leaves), leaves, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def forward_over_reverse(options: dict[str, Any]) -> None:
    jvp(grad(loss_of(options), (0, 1, 2)), tuple(inputs()), tuple(inputs()))


def reverse_over_forward(options: dict[str, Any]) -> None:
    primals, tangents = tuple(inputs()), tuple(inputs())
    grad(lambda *a: jvp(loss_of(options), a, tangents)[1], (0, 1, 2))(*primals)


def reverse_over_reverse(options: dict[str, Any]) -> None:
    grad(lambda *a: sum(g.square().sum() for g in grad(loss_of(options), (0, 1, 2))(*a)), (0, 1, 2))(*inputs())


def per_sample_gradients(options: dict[str, Any]) -> None:
    vmap(grad(loss_of(options), (0, 1, 2)), randomness="same")(*(torch.stack([x, -x]) for x in inputs()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    "derivative",
    [
        forward_mode,
        double_backward,
        forward_over_reverse,
        reverse_over_forward,
        reverse_over_reverse,
        per_sample_gradients,
    ],
    ids=lambda f: f.__name__,
)
def test_no_result_has_the_size_of_the_scores(derivative: Callable[..., None], options: dict[str, Any]) -> None:
    with LargestResult() as largest:
        derivative(options)
    assert 0 < largest.elements < LENGTH * LENGTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tangents_in_low_precision_are_near_float64(dtype: torch.dtype, isa: str) -> None:
    primals = [x.to(dtype) for x in inputs()]
    tangents = [x.to(dtype) for x in inputs()]
    state = torch.zeros(3, dtype=torch.int64)
    out, logsumexp, tangent_out, tangent_logsumexp = ops.attention_jvp(*primals, state, *tangents, None, None, None)

    def exact(*args: Tensor) -> tuple[Tensor, Tensor]:
        return reference.attention(*args)[:2]

    wanted = jvp(exact, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
    for actual, value in zip((out, logsumexp, tangent_out, tangent_logsumexp), (*wanted[0], *wanted[1]), strict=True):
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.double(), value, rtol=2 * eps, atol=64 * eps)


def test_opcheck_forward_mode_operators() -> None:
    query, key, value, *tangents = (torch.randn(2, 2, 5, 4) for _ in range(6))
    out, logsumexp, state = ops.attention_forward(query, key, value)
    args = (query, key, value, state, *tangents, None, None, None)
    torch.library.opcheck(ops.attention_jvp.default, args, {"is_causal": True})
    grad_out = torch.randn_like(out)
    output_tangents = torch.randn_like(out), torch.randn_like(logsumexp)
    args = (grad_out, None, query, key, value, out, logsumexp, state, *output_tangents)
    args = (*args, None, None, *tangents, None, None, None)
    wanted = [True, True, True, False, False, False]
    torch.library.opcheck(ops.attention_backward_jvp.default, args, {"output_mask": wanted})
