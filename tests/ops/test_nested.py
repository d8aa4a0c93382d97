"""Jagged nested tensors: scaled_dot_product_attention and attention take them without padding, with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_attn

LENGTHS = (5, 2, 9)


def jagged(lengths: tuple[int, ...] = LENGTHS, heads: int = 2, dim: int = 4) -> Tensor:
    rows = [torch.randn(n, heads, dim, dtype=torch.float64) for n in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def like(x: Tensor) -> Tensor:
    rows = torch.randn_like(x.values()).requires_grad_()
    return torch.nested.nested_tensor_from_jagged(rows, x.offsets())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_equals_torchs_own() -> None:
    """Which has no causal mask for these on the CPU."""
    query = jagged()
    leaves = [query, *(torch.randn_like(query.values()).requires_grad_() for _ in range(2))]
    inputs = [query, *(torch.nested.nested_tensor_from_jagged(x, query.offsets()) for x in leaves[1:])]
    heads_first = [x.transpose(1, 2) for x in inputs]
    results = []
    for function in (torch_attn.scaled_dot_product_attention, F.scaled_dot_product_attention):
        out = function(*heads_first)
        assert out.is_nested and out.size(2) == heads_first[0].size(2)
        gradients = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), leaves)
        results.append([out.transpose(1, 2).values(), *(g.values() if g.is_nested else g for g in gradients)])
    torch.testing.assert_close(*results)


def test_every_entry_is_attended_by_itself() -> None:
    """Keys of other lengths than the queries', grouped heads, a window, and logsumexp."""
    query, key = jagged(heads=4), jagged((3, 8, 9))
    value = like(key)
    options = {"window_left": 3, "is_causal": True, "causal_alignment": "bottom_right", "enable_gqa": True}
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    out, logsumexp = torch_attn.attention(*heads_first, **options, return_logsumexp=True)
    rows = [x.unbind() for x in (query, key, value)]
    for i, (q, k, v) in enumerate(zip(*rows, strict=True)):
        expected = torch_attn.attention(*(x.transpose(0, 1) for x in (q, k, v)), **options, return_logsumexp=True)
        torch.testing.assert_close(out.transpose(1, 2).unbind()[i].transpose(0, 1), expected[0])
        torch.testing.assert_close(logsumexp.transpose(1, 2).unbind()[i].transpose(0, 1), expected[1])


def test_rows_with_gaps_are_packed_first() -> None:
    rows = torch.randn(3, 9, 2, 4, dtype=torch.float64)
    gaps = torch.nested.narrow(rows, 1, torch.zeros(3, dtype=torch.long), torch.tensor(LENGTHS), layout=torch.jagged)
    x = gaps.transpose(1, 2)
    out = torch_attn.scaled_dot_product_attention(x, x, x).transpose(1, 2).unbind()
    for i, n in enumerate(LENGTHS):
        one = rows[i, :n].transpose(0, 1)
        torch.testing.assert_close(out[i].transpose(0, 1), torch_attn.scaled_dot_product_attention(one, one, one))


def test_what_cannot_be_nested_is_refused() -> None:
    x = jagged()
    y = x.transpose(1, 2)
    with pytest.raises(ValueError, match="attn_mask must be None with nested tensors"):
        torch_attn.scaled_dot_product_attention(y, y, y, attn_mask=torch.ones(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query must be one of layout torch.jagged, the transpose\(1, 2\)"):
        torch_attn.scaled_dot_product_attention(x, x, x)
    with pytest.raises(ValueError, match=r"key must be one of layout torch.jagged.*shape \(3, 2, 9, 4\)"):
        torch_attn.scaled_dot_product_attention(y, torch.randn(3, 2, 9, 4), y)
    with pytest.raises(ValueError, match="key and value must have entries of the same lengths"):
        torch_attn.scaled_dot_product_attention(y, y, jagged((2, 5, 9)).transpose(1, 2))
