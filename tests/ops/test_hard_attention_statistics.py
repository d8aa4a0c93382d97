"""The draws follow the softmax, and what is learned from them is right on average.

Every seed is fixed, so that a correct library passes always; the bounds would reject one draw of seeds in 10⁷.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torch_attn
from torch_attn import reference

DRAWS = 20_000
FALSE_ALARM_Z = 5.2  # of a normal variable: two-sided probability 2e-7, one-sided 1e-7


def chi_square_z(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic as a normal variable, by Wilson and Hilferty's cube root (1931)."""
    expected = probabilities.double() * counts.sum()
    assert (expected > 5).all(), "the test needs more draws"
    statistic = ((counts - expected).square() / expected).sum().item()
    df = counts.numel() - 1
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def scene(keys: int, spread: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """One query, asked by DRAWS rows at once, and keys."""
    generator = torch.Generator().manual_seed(2024)
    query = torch.randn(1, 1, 1, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 1, keys, 8, generator=generator, dtype=torch.float64) * spread
    return query.to(dtype).expand(1, 1, DRAWS, 8), key.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_frequencies_with_replacement_are_the_softmax(dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(1)
    query, key = scene(100, 0.5, dtype)
    options = {"temperature": 0.8, "softcap": 4.0}
    result = torch_attn.hard_attention(query, key, key, num_samples=2, **options)
    logits = reference.logits(query[:, :, :1].double(), key.double(), softcap=4.0).flatten()
    counts = torch.bincount(result.indices.flatten(), minlength=100)
    assert chi_square_z(counts, torch.softmax(logits / 0.8, 0)) < FALSE_ALARM_Z
    assert chi_square_z(counts, torch.softmax(logits / 1.0, 0)) > FALSE_ALARM_Z  # it can tell


def test_draws_of_a_row_are_independent(isa: str) -> None:
    torch.manual_seed(2)
    query, key = scene(6, 0.5)
    first, second = torch_attn.hard_attention(query, key, key, num_samples=2).indices.flatten(1)
    p = torch.softmax(reference.logits(query[:, :, :1], key).flatten(), 0)
    counts = torch.bincount(first * 6 + second, minlength=36)
    assert chi_square_z(counts, torch.outer(p, p).flatten()) < FALSE_ALARM_Z


def test_draws_without_replacement_follow_one_another(isa: str) -> None:
    """P(i, then j) = p_i · p_j / (1 − p_i)."""
    torch.manual_seed(3)
    query, key = scene(6, 0.5)
    first, second = torch_attn.hard_attention(query, key, key, num_samples=2, replacement=False).indices.flatten(1)
    p = torch.softmax(reference.logits(query[:, :, :1], key).flatten(), 0)
    pairs = (torch.outer(p, p) / (1 - p).unsqueeze(1)).flatten()
    different = ~torch.eye(6, dtype=torch.bool).flatten()
    counts = torch.bincount(first * 6 + second, minlength=36)
    assert (counts[~different] == 0).all()
    assert chi_square_z(counts[different], pairs[different]) < FALSE_ALARM_Z


@pytest.mark.parametrize("replacement", [True, False])
def test_a_sink_is_drawn_like_a_key(replacement: bool, isa: str) -> None:
    torch.manual_seed(4)
    query, key = scene(40, 0.3)
    sinks = torch.tensor([1.5])
    indices = torch_attn.hard_attention(query, key, key, sinks=sinks, replacement=replacement).indices.flatten()
    p = torch.softmax(reference.logits(query[:, :, :1], key, sinks=sinks).flatten(), 0)
    counts = torch.bincount(torch.where(indices < 0, 40, indices), minlength=41)
    assert chi_square_z(counts, p) < FALSE_ALARM_Z


@pytest.mark.parametrize("replacement", [True, False])
def test_rows_of_huge_scores_are_drawn_evenly(replacement: bool, isa: str) -> None:
    """Noise added to scores of −1e9 would be rounded away, and the first key win."""
    torch.manual_seed(5)
    query, key = scene(64, 0.0)
    mask = torch.full((1, 1, 1, 64), -1e9)
    indices = torch_attn.hard_attention(query, key, key, attn_mask=mask, replacement=replacement).indices.flatten()
    assert chi_square_z(torch.bincount(indices, minlength=64), torch.full((64,), 1 / 64)) < FALSE_ALARM_Z


@pytest.mark.parametrize("num_samples", [1, 4])
def test_reinforce_is_the_exact_gradient_on_average(num_samples: int, isa: str) -> None:
    """Of the expected reward Σ p_j r_j, enumerated; each row is one estimate, so their spread gives the error."""
    torch.manual_seed(6)
    query, key = scene(9, 0.7, torch.float64)
    reward = 3 * torch.randn(9, dtype=torch.float64)
    rows = query.contiguous().requires_grad_()
    result = torch_attn.hard_attention(rows, key, key, num_samples=num_samples)
    (estimates,) = torch.autograd.grad((reward[result.indices] * result.log_prob).sum() / num_samples, rows)
    one = query[:, :, :1].contiguous().requires_grad_()
    expected_reward = (torch.softmax(reference.logits(one, key), -1) * reward).sum()
    (exact,) = torch.autograd.grad(expected_reward, one)
    error = (estimates.mean(2) - exact.squeeze(2)) / (estimates.std(2) / math.sqrt(DRAWS))
    assert error.abs().max() < FALSE_ALARM_Z + 0.4  # the largest of 8
    assert exact.abs().max() > 20 * (estimates.std(2) / math.sqrt(DRAWS)).max()  # an error would show


def test_a_leave_one_out_baseline_lowers_the_variance() -> None:
    """Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!": unbiased, and less noisy."""
    torch.manual_seed(7)
    query, key = scene(9, 0.7, torch.float64)
    rewards = torch.randn(9, dtype=torch.float64) + 3
    rows = query.contiguous().requires_grad_()
    result = torch_attn.hard_attention(rows, key, key, num_samples=4)
    reward = rewards[result.indices]
    baseline = (reward.sum(0) - reward) / 3
    (plain,) = torch.autograd.grad((reward * result.log_prob).sum() / 4, rows, retain_graph=True)
    (lowered,) = torch.autograd.grad(((reward - baseline) * result.log_prob).sum() / 4, rows)
    assert (lowered.var(2) < 0.5 * plain.var(2)).all()
    spread = ((plain - lowered).std(2) / math.sqrt(DRAWS)).clamp(min=1e-12)
    assert ((plain.mean(2) - lowered.mean(2)).abs() < (FALSE_ALARM_Z + 0.4) * spread).all()


def test_every_place_has_noise_of_its_own() -> None:
    for replacement in (True, False):
        noise = torch.ops.torch_attn.selection_noise(torch.tensor([8, 0, 0]), 2, 3, 20, 100, 2, replacement, True)
        numbers = noise[..., 0] if replacement else noise
        assert numbers.unique().numel() == numbers.numel()
