"""The reference, which judges every kernel, is checked against torch where torch can say it, by hand elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from torch_attn import reference


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_and_causal_equal_sdpa(is_causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    out, logsumexp, weights = reference.attention(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=is_causal))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    assert logsumexp.isfinite().all()


def test_band_mask_by_hand() -> None:
    mask = reference.band_mask(3, 5, window_left=1, window_right=0, causal_alignment="bottom_right")[0, 0]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    lengths = torch.tensor([2, 5])
    mask = reference.band_mask(2, 5, is_causal=True, causal_alignment="bottom_right", key_lengths=lengths)[:, 0]
    assert mask.int().tolist() == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


def test_softcap_alibi_and_sink_by_hand() -> None:
    query, key, value = torch.ones(1, 1, 1, 1).double(), torch.tensor([2.0, 3.0]).view(1, 1, 2, 1).double(), None
    value = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1).double()
    out, logsumexp, _ = reference.attention(
        query,
        key,
        value,
        scale=1.0,
        softcap=2.0,
        alibi_slopes=torch.tensor([0.5]).double(),
        sinks=torch.tensor([0.1]).double(),
    )
    scores = [2 * math.tanh(1.0), 2 * math.tanh(1.5) - 0.5, 0.1]
    total = sum(math.exp(s) for s in scores)
    assert math.isclose(out.item(), math.exp(scores[0]) / total)
    assert math.isclose(logsumexp.item(), math.log(total))


def test_empty_rows_are_zero_with_zero_gradients() -> None:
    query, key, value = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, logsumexp, weights = reference.attention(
        query, key, value, attn_mask=torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    )
    assert (out[:, :, 1] == 0).all() and (weights[:, :, 1] == 0).all() and logsumexp[0, 0, 1] == -math.inf
    out.sum().backward()
    assert query.grad is not None and (query.grad[:, :, 1] == 0).all() and query.grad.isfinite().all()
