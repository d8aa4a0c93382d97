"""What the operators promise beyond accuracy: edge shapes, layouts, broadcasting, dropout's bits, NaN, determinism."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_attn
from torch_attn import reference

from ..oracle import Call, assert_kernel_accurate

ops = torch.ops.torch_attn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def qkv(*shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 0, 0, 0)], ids=str)
def test_empty_dimensions_give_zero_output_and_zero_gradients(
    sizes: tuple[int, ...], dtype: torch.dtype, isa: str, poisoned_memory: None
) -> None:
    batch, heads, query_length, key_length = sizes
    query = torch.randn(batch, heads, query_length, 4, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(batch, heads, key_length, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    out, logsumexp, _ = ops.attention_forward(query, key, value)
    assert out.shape == query.shape and (out == 0).all()
    assert (logsumexp == -math.inf).all()
    out.sum().backward()
    for x in (query, key, value):
        assert x.grad is not None and x.grad.shape == x.shape and (x.grad == 0).all()


@pytest.mark.parametrize("masked_by", ["bool_mask", "float_mask", "key_lengths", "causal_bottom_right"])
def test_a_row_with_no_key_gives_zero_and_minus_infinity(masked_by: str, isa: str, poisoned_memory: None) -> None:
    query, key, value = qkv(2, 2, 6, 4)
    empty = torch.zeros(2, 6, dtype=torch.bool)
    options: dict = {}
    if masked_by == "causal_bottom_right":
        key, value = (x[:, :, :2].detach().requires_grad_() for x in (key, value))
        options = {"is_causal": True, "causal_alignment": "bottom_right"}
        empty[:, :4] = True
    elif masked_by == "key_lengths":
        options = {"key_lengths": torch.tensor([0, 6])}
        empty[0] = True
    else:
        mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
        mask[:, :, 2] = False
        added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        options = {"attn_mask": mask if masked_by == "bool_mask" else added}
        empty[:, 2] = True
    out, logsumexp, _ = ops.attention_forward(query, key, value, **options)
    rows = empty[:, None].expand(2, 2, 6)
    assert (out[rows] == 0).all() and (logsumexp[rows] == -math.inf).all()
    assert logsumexp[~rows].isfinite().all()
    out.square().sum().backward()
    assert query.grad is not None and (query.grad[rows] == 0).all()
    for x in (query, key, value):
        assert x.grad is not None and x.grad.isfinite().all()


def test_a_sink_takes_weight_even_in_an_empty_row(isa: str) -> None:
    query, key, value = qkv(1, 2, 3, 4)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    nothing = torch.zeros(3, 3, dtype=torch.bool)[None, None]
    out, logsumexp, _ = ops.attention_forward(query, key, value, attn_mask=nothing, sinks=sinks)
    assert (out == 0).all()
    torch.testing.assert_close(logsumexp, sinks[None, :, None].expand(1, 2, 3))


def test_uniform_rows_of_the_minimum_bias_share_the_gradient(isa: str) -> None:
    """torch's CPU flash kernel makes value's gradient S times too large here."""
    query, key, value = qkv(1, 1, 4, 8, dtype=torch.float32)
    mask = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min)
    out = ops.attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))
    out.sum().backward()
    assert value.grad is not None
    torch.testing.assert_close(value.grad, torch.ones_like(value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["query", "key", "value", "attn_mask"])
def test_nan_reaches_the_rows_that_attend_it_and_no_other(where: str, dtype: torch.dtype, isa: str) -> None:
    length = 70
    inputs = dict(zip(("query", "key", "value"), qkv(1, 1, length, 8, dtype=dtype, requires_grad=False), strict=True))
    inputs["attn_mask"] = torch.zeros(1, 1, length, length, dtype=dtype)
    inputs[where][0, 0, 40, 3] = math.nan
    out = ops.attention(**inputs, is_causal=True)
    nan_rows = out.isnan().any(-1).flatten()
    expected = torch.zeros(length, dtype=torch.bool)
    if where in ("query", "attn_mask"):
        expected[40] = True
    else:
        expected[40:] = True
    if where == "value":  # a weight of 0 times NaN is NaN, in torch's math too: rows that mask the key may show it
        nan_rows, expected = nan_rows[40:], expected[40:]
    assert torch.equal(nan_rows, expected)


def test_output_layout_lets_heads_merge_without_a_copy() -> None:
    query, key, value = qkv(2, 3, 5, 4, requires_grad=False)
    out = ops.attention(query, key, value)
    assert out.transpose(1, 2).reshape(2, 5, 12).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_are_accepted(dtype: torch.dtype, isa: str) -> None:
    def strided(heads: int, length: int, dim: int, kind: str) -> Tensor:
        if kind == "every_second":
            return torch.randn(2, heads, 2 * length, 2 * dim).to(dtype)[:, :, ::2, ::2]
        if kind == "column_major":
            return torch.randn(2, heads, dim, length).to(dtype).transpose(-2, -1)
        if kind == "broadcast_rows":
            return torch.randn(2, heads, 1, dim).to(dtype).expand(2, heads, length, dim)
        return torch.randn(length, 2, heads, dim).to(dtype).permute(1, 2, 0, 3)

    for kinds in (("every_second", "column_major", "other"), ("broadcast_rows", "other", "column_major")):
        query, key, value = (strided(2, n, d, k) for n, d, k in zip((9, 11, 11), (6, 6, 5), kinds, strict=True))
        call = Call(query, key, value, {}, strided(2, 9, 5, "column_major"), None)
        assert_kernel_accurate(call)


SHAPES = [
    ((5, 4), (7, 4), (7, 3)),
    ((2, 5, 4), (2, 7, 4), (2, 7, 3)),
    ((2, 3, 5, 4), (1, 3, 7, 4), (2, 1, 7, 3)),
    ((1, 3, 5, 4), (2, 3, 7, 4), (3, 7, 3)),
    ((2, 2, 3, 5, 4), (2, 1, 3, 7, 4), (1, 2, 3, 7, 3)),
    ((3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_leading_dimensions_broadcast_as_in_sdpa(shapes: tuple[tuple[int, ...], ...]) -> None:
    ours = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    out = torch_attn.scaled_dot_product_attention(*ours)
    expected = F.scaled_dot_product_attention(*theirs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


MASK_SHAPES = [(7,), (5, 7), (1, 7), (5, 1), (3, 5, 7), (3, 1, 7)]
MASK_SHAPES += [(2, 1, 5, 7), (1, 3, 5, 7), (2, 3, 1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_a_float_mask_has_a_gradient_in_its_own_shape(shape: tuple[int, ...], isa: str) -> None:
    query = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    key, value = torch.randn(2, 3, 7, 4, dtype=torch.float64), torch.randn(2, 3, 7, 4, dtype=torch.float64)
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    other = mask.detach().clone().requires_grad_()
    weight = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    (ops.attention(query, key, value, attn_mask=mask) * weight).sum().backward()
    (reference.attention(query, key, value, attn_mask=other)[0] * weight).sum().backward()
    assert mask.grad is not None and mask.grad.shape == mask.shape
    torch.testing.assert_close(mask.grad, other.grad)


def test_five_dimensional_masks_collapse_with_the_batch() -> None:
    query, key, value = qkv(2, 3, 2, 5, 4, requires_grad=False)
    mask = torch.randn(1, 3, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    out = ops.attention(query, key, value, attn_mask=mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    (actual,) = torch.autograd.grad(out.square().sum(), mask)
    (wanted,) = torch.autograd.grad(expected.square().sum(), mask)
    torch.testing.assert_close(actual, wanted)


class TestDropout:
    def test_manual_seed_reproduces_it(self) -> None:
        query, key, value = qkv(2, 2, 33, 8, requires_grad=False)
        torch.manual_seed(5)
        first = ops.attention(query, key, value, dropout_p=0.4)
        second = ops.attention(query, key, value, dropout_p=0.4)
        torch.manual_seed(5)
        again = ops.attention(query, key, value, dropout_p=0.4)
        assert torch.equal(first, again) and not torch.equal(first, second)

    def test_bits_do_not_depend_on_threads_or_instruction_set(self) -> None:
        query, key, value = qkv(2, 2, 150, 8, dtype=torch.float32, requires_grad=False)
        results = []
        before = torch.get_num_threads()
        for threads in (1, 2, 3):
            for isa in ops.cpu_isas():
                torch.set_num_threads(threads)
                ops.force_cpu_isa(isa)
                torch.manual_seed(9)
                # Values that mark each key with its own power of two turn the output into the set of kept keys.
                results.append(ops.attention(torch.zeros_like(query), key, value, dropout_p=0.5))
        torch.set_num_threads(before)
        ops.force_cpu_isa("")
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)

    def test_kernel_uses_the_bits_of_dropout_keep_mask(self, isa: str) -> None:
        length = 45
        query = torch.zeros(2, 3, length, 4, dtype=torch.float64)
        identity = torch.eye(length, dtype=torch.float64).expand(2, 3, length, length)
        key = torch.zeros(2, 3, length, 4, dtype=torch.float64)
        out, _, rng_state = ops.attention_forward(query, key, identity, dropout_p=0.3)
        keep = ops.dropout_keep_mask(rng_state, 2, 3, length, length, 0.3)
        assert torch.equal(out != 0, keep)
        torch.testing.assert_close(out[keep], torch.full_like(out[keep], reference.dropout_scale(0.3) / length))

    def test_drops_the_stated_share(self) -> None:
        state = torch.tensor([int(torch.randint(2**62, ())), 0, 0])
        keep = ops.dropout_keep_mask(state, 4, 4, 256, 256, 0.1)
        count, probability = keep.numel(), 0.9
        deviation = (keep.double().mean().item() - probability) / math.sqrt(probability * 0.1 / count)
        assert abs(deviation) < 6  # false alarm: 2e-9

    def test_one_drops_everything_and_zero_nothing(self, isa: str) -> None:
        query, key, value = qkv(1, 2, 9, 4)
        out = ops.attention(query, key, value, dropout_p=1.0)
        assert (out == 0).all()
        out.sum().backward()
        assert query.grad is not None and (query.grad == 0).all()
        torch.testing.assert_close(
            ops.attention(query, key, value, dropout_p=0.0), F.scaled_dot_product_attention(query, key, value)
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_thread_count_changes_nothing_but_rounding(heads: int, causal: bool, isa: str) -> None:
    results = []
    before = torch.get_num_threads()
    inputs = [torch.randn(1, heads, 411, 16) for _ in range(4)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out = ops.attention(*leaves, is_causal=causal)
        results.append([out, *torch.autograd.grad(out, leaves, inputs[3])])
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_repeated_calls_are_bitwise_equal(isa: str) -> None:
    inputs = [torch.randn(1, 2, 300, 16, requires_grad=True) for _ in range(3)]

    def run() -> list[Tensor]:
        out = ops.attention(*inputs, is_causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
