"""The dropout bits as random numbers: their rate, their independence in every direction, and what p is rounded to."""

from __future__ import annotations

import math

import pytest
import torch

import torch_attn
from torch_attn.reference import dropout_scale

SIGMAS = 5.0  # a false alarm in 2 million


def keep_mask(p: float, batch: int = 3, heads: int = 4, rows: int = 256, keys: int = 512) -> torch.Tensor:
    state = torch.tensor([int(torch.randint(2**62, ())), int(torch.randint(2**40, ())), 0])
    return torch.ops.torch_attn.dropout_keep_mask(state, batch, heads, rows, keys, p)


def rounded(p: float) -> float:
    return math.floor(p * 2**16 + 0.5) / 2**16


@pytest.mark.parametrize("p", [2**-16, 0.001, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_share_of_dropped_weights_is_p(p: float) -> None:
    keep = keep_mask(p)
    dropped, count, p = (~keep).sum().item(), keep.numel(), rounded(p)
    assert abs(dropped - p * count) < SIGMAS * math.sqrt(p * (1 - p) * count) + 1


@pytest.mark.parametrize("p", [2**-9, 0.1, 0.5])
def test_share_is_p_in_every_place_of_a_call(p: float) -> None:
    """A Philox call serves 2 rows × 8 keys; vectors and fragments of tensor cores, rows and keys modulo 16."""
    keep = keep_mask(p).view(3, 4, 256 // 16, 16, 512 // 16, 16)
    share = keep.double().mean((0, 1, 2, 4))
    deviation = math.sqrt(p * (1 - p) / (keep.numel() / 256))
    assert (share - (1 - rounded(p))).abs().max() < (SIGMAS + 1) * deviation  # of 256 shares


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "step",
    [(0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 3), (0, 0, 0, 4), (0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 1, 2)]
    + [(0, 0, 0, 5), (0, 0, 0, 6), (0, 0, 0, 7), (0, 0, 1, 4), (0, 0, 2, 0), (0, 0, 8, 0), (0, 0, 0, 8)]
    + [(0, 1, 0, 0), (1, 0, 0, 0)],
    ids=str,
)
def test_neighbours_are_independent(p: float, step: tuple[int, int, int, int]) -> None:
    keep = keep_mask(p)
    here, there = keep, keep
    for dim, distance in enumerate(step):
        here = here.narrow(dim, 0, here.size(dim) - distance)
        there = there.narrow(dim, distance, there.size(dim) - distance)
    p = rounded(p)
    covariance = ((here.double() - (1 - p)) * (there.double() - (1 - p))).mean().item()
    assert abs(covariance) < SIGMAS * p * (1 - p) / math.sqrt(here.numel())


@pytest.mark.parametrize("p", [2**-9, 1 / 8 + 2**-9, 0.1, 0.5, 1 - 2**-9])
def test_weights_that_share_bits_are_as_good_as_independent(p: float) -> None:
    """The lower 8 bits are those of 2 rows × 8 keys: the covariance is 2^-16 times their variance."""
    dropped = (~keep_mask(p)).view(3, 4, 128, 2, 64, 8).transpose(3, 4).reshape(-1, 16).double()
    p, f = rounded(p), rounded(p) * 2**8 % 1
    of_pairs = (dropped - p).T @ (dropped - p) / len(dropped)
    expected, variance = 2**-16 * f * (1 - f), (p * (1 - p)) ** 2
    either = torch.ones(16, 16).triu(1) == 1
    deviations = (of_pairs[either] - expected) / math.sqrt((variance + expected) / len(dropped))
    if p * (1 - p) > 0.01:  # else a pair has too few events to be normally distributed
        assert deviations.abs().max() < SIGMAS + 1  # of 120 pairs
    assert deviations.mean().abs() < SIGMAS / math.sqrt(120)


def test_seeds_and_offsets_give_independent_bits() -> None:
    sizes, p = (2, 4, 128, 256), 0.5
    masks = [
        torch.ops.torch_attn.dropout_keep_mask(torch.tensor([seed, offset, 0]), *sizes, p)
        for seed, offset in [(5, 0), (6, 0), (5 + 2**32, 0), (5, 8), (5, 2**32)]
    ]
    count = masks[0].numel()
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).sum().item() - count / 2) < (SIGMAS + 1) * math.sqrt(count) / 2


def test_p_is_rounded_to_a_multiple_of_2_to_the_minus_16() -> None:
    state, sizes = torch.tensor([int(torch.randint(2**62, ())), 0, 0]), (1, 8, 256, 512)
    masks = {
        p: torch.ops.torch_attn.dropout_keep_mask(state, *sizes, p)
        for p in (0.1, 6554 / 2**16, 6553 / 2**16, 6555 / 2**16)
    }
    assert torch.equal(masks[0.1], masks[6554 / 2**16])
    for other in (6553, 6555):  # bits are nested; of 2^20, 16 tell one step from the next
        assert not torch.equal(masks[0.1], masks[other / 2**16])
    assert (masks[0.1] <= masks[6553 / 2**16]).all() and (masks[6555 / 2**16] <= masks[0.1]).all()


@pytest.mark.parametrize("p", [0.0, 7e-6])
def test_p_that_rounds_to_zero_drops_nothing(p: float) -> None:
    assert keep_mask(p).all() and dropout_scale(p) == 1.0
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    assert torch.equal(torch_attn.attention(q, k, v, dropout_p=p), torch_attn.attention(q, k, v))


@pytest.mark.parametrize("p", [1.0, 1 - 7e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_p_that_rounds_to_one_drops_everything(dtype: torch.dtype, p: float) -> None:
    assert not keep_mask(p).any()
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=dtype).requires_grad_() for _ in range(3))
    out = torch_attn.attention(q, k, v, dropout_p=p)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not any(x.any() for x in (out, *grads))


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_weights_are_scaled_by_the_rounded_p(dtype: torch.dtype, p: float) -> None:
    """With values of one and equal scores, an output is the number of kept keys, times scale / keys."""
    rows, keys = 96, 256
    q, k = torch.zeros(1, 2, rows, 64, dtype=dtype), torch.randn(1, 2, keys, 64, dtype=dtype)
    v = torch.ones(1, 2, keys, 64, dtype=dtype)
    state = torch.tensor([int(torch.randint(2**62, ())), 0, 0])
    out = torch.ops.torch_attn.attention_forward(q, k, v, dropout_p=p, rng_state=state)[0]
    kept = torch.ops.torch_attn.dropout_keep_mask(state, 1, 2, rows, keys, p).double().sum(-1, keepdim=True)
    expected = kept / (1 - rounded(p)) / keys
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(out.double(), expected.expand_as(out), rtol=tolerance, atol=0)
