"""torch_attn::self_attention: attention of one tensor that holds query, key and value, whose gradient is one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

ops = torch.ops.torch_attn
BATCH, LENGTH, HEADS, DIM = 2, 21, 3, 16

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "scale": 0.3},
    "window": {"window_left": 4, "window_right": 2, "softcap": 5.0},
    "dropout": {"dropout_p": 0.4},
    "padding": {
        "attn_mask": torch.arange(LENGTH).expand(BATCH, 1, 1, LENGTH) < torch.tensor([5, LENGTH])[:, None, None, None]
    },
    "mask of two dimensions": {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()},
    "key lengths": {"key_lengths": torch.tensor([0, 7])},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 0.0]), "alibi_slopes": torch.tensor([0.5, 0.25, 0.125])},
}


def draw(dtype: torch.dtype = torch.float32, dim: int = DIM) -> Tensor:
    return torch.randn(BATCH, LENGTH, 3, HEADS, dim, dtype=torch.float64).to(dtype)


def by_parts(qkv: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return ops.attention(q, k, v, **options)


def value_and_gradient(attention: Any, qkv: Tensor, direction: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf, **options)
    return out.detach(), torch.autograd.grad(out, leaf, direction)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dim", [16, 24])
def test_equals_attention_of_the_parts(isa: str, name: str, dtype: torch.dtype, dim: int) -> None:
    qkv, direction = draw(dtype, dim), torch.randn(BATCH, HEADS, LENGTH, dim).to(dtype)
    actual = value_and_gradient(ops.self_attention, qkv, direction, **OPTIONS[name])
    expected = value_and_gradient(by_parts, qkv, direction, **OPTIONS[name])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradient_is_one_tensor_laid_out_like_the_input() -> None:
    for order in ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4)):
        qkv = draw().permute(order).contiguous().permute(order).requires_grad_()
        (gradient,) = torch.autograd.grad(ops.self_attention(qkv).sum(), qkv)
        assert gradient.stride() == qkv.stride()


def test_gradient_is_right_whatever_the_strides() -> None:
    direction = torch.randn(BATCH, HEADS, LENGTH, DIM)
    apart = torch.randn(BATCH, 2 * LENGTH, 3, HEADS, DIM)[:, ::2]
    columns_first = draw().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    for qkv in (apart, columns_first):
        actual = value_and_gradient(ops.self_attention, qkv, direction)
        expected = value_and_gradient(ops.self_attention, qkv.contiguous(), direction)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradient_needs_one_kernel_and_no_copy() -> None:
    qkv = draw().requires_grad_()
    out = ops.self_attention(qkv)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    names = {event.name for event in profile.events()}
    assert "torch_attn::self_attention_backward" in names
    assert not names & {"aten::cat", "aten::stack", "aten::copy_"}


@pytest.mark.parametrize("name", ["plain", "causal", "padding", "sinks"])
def test_derivatives_of_first_and_second_order(name: str) -> None:
    options = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in OPTIONS[name].items()
    }
    if name == "padding":
        options["attn_mask"] = options["attn_mask"][..., :4]
    qkv = torch.randn(BATCH, 4, 3, HEADS, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return ops.self_attention(x, **options)

    assert gradcheck(call, qkv, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, qkv, check_fwd_over_rev=True)


def test_options_have_gradients() -> None:
    qkv = draw(torch.float64)
    mask = torch.randn(1, HEADS, LENGTH, LENGTH, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    qkv.requires_grad_()
    inputs = (qkv, mask, sinks)
    actual = torch.autograd.grad(ops.self_attention(qkv, attn_mask=mask, sinks=sinks).sum(), inputs)
    expected = torch.autograd.grad(by_parts(qkv, attn_mask=mask, sinks=sinks).sum(), inputs)
    torch.testing.assert_close(actual, expected)


def test_transforms() -> None:
    qkv = torch.stack([draw(torch.float64) for _ in range(3)])
    expected = torch.stack([ops.self_attention(x) for x in qkv])
    torch.testing.assert_close(torch.vmap(ops.self_attention)(qkv), expected)

    def loss(x: Tensor) -> Tensor:
        return ops.self_attention(x, is_causal=True).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss))(qkv)
    torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(loss)(x) for x in qkv]))
    leaf = qkv[0].clone().requires_grad_()
    torch.testing.assert_close(per_sample[0], torch.autograd.grad(loss(leaf), leaf)[0])
    with fwAD.dual_level():
        dual = fwAD.make_dual(qkv[0], qkv[1])
        tangent = fwAD.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(tangent, (per_sample[0] * qkv[1]).sum())


def test_autocast_gives_its_dtype_and_a_gradient_of_the_input_s() -> None:
    qkv = draw().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.self_attention(qkv)
    assert out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), qkv)
    assert gradient.dtype == torch.float32
    leaf = qkv.detach().bfloat16().requires_grad_()
    expected = torch.autograd.grad(ops.self_attention(leaf).float().sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected.float())


def test_recomputation_repeats_the_dropout() -> None:
    qkv, direction = draw(), torch.randn(BATCH, HEADS, LENGTH, DIM)
    kept = value_and_gradient(ops.self_attention, qkv, direction, dropout_p=0.3)
    again = value_and_gradient(
        lambda x, **options: checkpoint(ops.self_attention, x, use_reentrant=False, **options),
        qkv,
        direction,
        dropout_p=0.3,
    )
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window_left": 3}], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    qkv = draw().requires_grad_()
    torch.library.opcheck(ops.self_attention.default, (qkv,), options)
    q, k, v = (x.transpose(1, 2) for x in qkv.detach().unbind(2))
    out, logsumexp, rng_state = ops.attention_forward(q, k, v, **options)
    arguments = (torch.randn_like(out), qkv.detach(), out, logsumexp, rng_state)
    torch.library.opcheck(ops.self_attention_backward.default, arguments, options)
    arguments = (arguments[0], qkv, *arguments[2:])
    torch.library.opcheck(ops.self_attention_backward.default, arguments, options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_with_its_gradient(backend: str) -> None:
    torch._dynamo.reset()
    qkv, direction = draw(), torch.randn(BATCH, HEADS, LENGTH, DIM)
    compiled = torch.compile(ops.self_attention, fullgraph=True, backend=backend)
    actual = value_and_gradient(compiled, qkv, direction, is_causal=True)
    torch.testing.assert_close(actual, value_and_gradient(ops.self_attention, qkv, direction, is_causal=True))


def test_compiled_autograd_traces_the_gradient() -> None:
    torch._dynamo.reset()
    qkv, direction = draw(), torch.randn(BATCH, HEADS, LENGTH, DIM)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        actual = value_and_gradient(ops.self_attention, qkv, direction, is_causal=True)
    torch.testing.assert_close(actual, value_and_gradient(ops.self_attention, qkv, direction, is_causal=True))


def test_wrong_shapes_are_named() -> None:
    for shape in ((BATCH, LENGTH, HEADS, DIM), (BATCH, LENGTH, 2, HEADS, DIM)):
        for requires_grad in (False, True):
            with pytest.raises(RuntimeError, match=r"qkv must have shape \(batch, length, 3, heads, head_dim\)"):
                ops.self_attention(torch.randn(shape, requires_grad=requires_grad))
