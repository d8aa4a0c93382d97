"""merge_attention: parts of the keys, attended apart and merged, are all keys attended at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_attn
from torch_attn import merge_attention

from .oracle import max_error

HEADS, ROWS, KEYS, DIM = 2, 5, 23, 6


def parts_of(query: Tensor, key: Tensor, value: Tensor, bounds: list[int], mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [
        torch_attn.attention(
            query,
            key[..., begin:end, :],
            value[..., begin:end, :],
            attn_mask=mask[..., begin:end],
            return_logsumexp=True,
        )
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and a mask in which row 0 has no key at all and row 1 none among the first ten."""
    query, key, value = (torch.randn(3, HEADS, n, DIM).to(dtype).requires_grad_() for n in (ROWS, KEYS, KEYS))
    mask = torch.rand(ROWS, KEYS) < 0.7
    mask[0] = False
    mask[1, :10] = False
    return query, key, value, mask


@pytest.mark.parametrize("bounds", [[0, 23], [0, 10, 23], [0, 1, 9, 9, 23]], ids=["one", "two", "four, one empty"])
def test_merged_parts_are_attention_to_all_keys(bounds: list[int]) -> None:
    *inputs, mask = draw()
    whole = torch_attn.attention(*inputs, attn_mask=mask, return_logsumexp=True)
    merged = merge_attention(*zip(*parts_of(*inputs, bounds, mask), strict=True))
    assert (whole[1][:, :, 0] == -math.inf).all()
    weights = [torch.randn_like(x) for x in whole]
    weights[1][:, :, 0] = 0  # of logsumexp −inf
    gradients = [
        torch.autograd.grad(
            [(results[0] * weights[0]).sum() + (results[1].masked_fill(mask.sum(-1) == 0, 0) * weights[1]).sum()],
            inputs,
        )
        for results in (merged, whole)
    ]
    for actual, exact in zip((*merged, *gradients[0]), (*whole, *gradients[1]), strict=True):
        assert max_error(actual, exact.detach()) < 1e-13 * max(1, len(bounds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_adds_one_rounding(dtype: torch.dtype) -> None:
    outputs = [torch.randn(2, ROWS, DIM).to(dtype) for _ in range(3)]
    logsumexps = [5 * torch.randn(2, ROWS) for _ in range(3)]
    out, logsumexp = merge_attention(outputs, logsumexps)
    exact, exact_logsumexp = merge_attention([x.double() for x in outputs], [x.double() for x in logsumexps])
    assert out.dtype == dtype and logsumexp.dtype == torch.float32
    assert max_error(out, exact) <= 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    assert max_error(logsumexp, exact_logsumexp) <= 4 * torch.finfo(torch.float32).eps * 32


def test_mixed_dtypes_promote() -> None:
    outputs = [torch.randn(ROWS, DIM), torch.randn(ROWS, DIM).bfloat16()]
    out, logsumexp = merge_attention(outputs, [torch.randn(ROWS), torch.randn(ROWS, dtype=torch.float64)])
    assert out.dtype == torch.float32 and logsumexp.dtype == torch.float64


def test_the_order_of_merging_does_not_matter() -> None:
    outputs = [torch.randn(ROWS, DIM, dtype=torch.float64) for _ in range(3)]
    logsumexps = [torch.randn(ROWS, dtype=torch.float64) for _ in range(3)]
    at_once = merge_attention(outputs, logsumexps)
    first = merge_attention(outputs[2:0:-1], logsumexps[2:0:-1])
    one_by_one = merge_attention([first[0], outputs[0]], [first[1], logsumexps[0]])
    torch.testing.assert_close(one_by_one, at_once)


def test_a_row_without_keys_anywhere_is_zero_with_zero_gradients() -> None:
    outputs = [torch.randn(ROWS, DIM, requires_grad=True) for _ in range(2)]
    logsumexps = [torch.full((ROWS,), -math.inf, requires_grad=True) for _ in range(2)]
    out, logsumexp = merge_attention(outputs, logsumexps)
    assert not out.any() and (logsumexp == -math.inf).all()
    grads = torch.autograd.grad([out, logsumexp], [*outputs, *logsumexps], [torch.ones_like(out), torch.ones(ROWS)])
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_the_output_of_a_part_without_keys_is_not_read() -> None:
    """Other kernels may leave NaN there."""
    output = torch.randn(ROWS, DIM)
    nothing = (torch.full((ROWS, DIM), math.nan, requires_grad=True), torch.full((ROWS,), -math.inf))
    logsumexp = torch.randn(ROWS)
    merged, merged_logsumexp = merge_attention([output, nothing[0]], [logsumexp, nothing[1]])
    assert torch.equal(merged, output) and torch.equal(merged_logsumexp, logsumexp)
    assert not torch.autograd.grad(merged.sum(), nothing[0])[0].any()


def test_huge_logsumexps_do_not_overflow() -> None:
    outputs = [torch.zeros(1, 1), torch.ones(1, 1)]
    out, logsumexp = merge_attention(outputs, [torch.tensor([1e30]), torch.tensor([1e30])])
    assert out.item() == 0.5 and logsumexp.item() == pytest.approx(1e30)
    out, _ = merge_attention(outputs, [torch.tensor([-1e30]), torch.tensor([1e30])])
    assert out.item() == 1.0


def test_a_sink_is_a_part_without_value() -> None:
    query, key, value, _ = draw()
    sinks = torch.randn(HEADS, dtype=torch.float64)
    out, logsumexp = torch_attn.attention(query, key, value, return_logsumexp=True)
    merged = merge_attention([out, torch.zeros_like(out)], [logsumexp, sinks[:, None].expand_as(logsumexp)])
    torch.testing.assert_close(merged, torch_attn.attention(query, key, value, sinks=sinks, return_logsumexp=True))


def test_derivatives_of_first_and_second_order() -> None:
    outputs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    logsumexps = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        empty = torch.tensor([True, False, False])  # part 1 has no key for row 0
        return merge_attention(tensors[:3], [tensors[3], tensors[4].masked_fill(empty, -math.inf), tensors[5]])

    assert gradcheck(merge, [*outputs, *logsumexps], check_forward_ad=True)
    assert gradgradcheck(merge, [*outputs, *logsumexps])


def test_it_compiles_without_graph_breaks() -> None:
    outputs, logsumexps = [torch.randn(2, ROWS, DIM) for _ in range(2)], [torch.randn(2, ROWS) for _ in range(2)]
    compiled = torch.compile(merge_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(outputs, logsumexps), merge_attention(outputs, logsumexps))


@pytest.mark.parametrize(
    "outputs, logsumexps, message",
    [
        ([], [], "outputs is empty"),
        ([torch.zeros(2, 3)], [], "as many logsumexps as outputs, but there are 0 and 1"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(2)] * 2, r"same shape, but there are \(2, 3\)"),
        ([torch.zeros(2, 3)], [torch.zeros(3)], r"without their last dimension, \(2,\), but one is \(3,\)"),
        ([torch.zeros(2, 3)], [torch.zeros(2, dtype=torch.int64)], "must be floating"),
    ],
)
def test_errors_name_what_does_not_fit(outputs: list[Tensor], logsumexps: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_attention(outputs, logsumexps)
