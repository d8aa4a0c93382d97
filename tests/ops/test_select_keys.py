"""select_keys, on each instruction set: the right keys, their log-probabilities, the entropy, and the gradients of it
all, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torch_attn import reference

from ..cases import CASE_BY_NAME, Case
from ..selection_oracle import (
    DTYPES,
    RULES,
    WITHOUT_DROPOUT,
    assert_gradients,
    assert_selected,
    exact_gradients,
    gradient_weights,
    inputs_of,
    leaves_of,
    loss_of,
    noise_of,
)

ops = torch.ops.torch_attn


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
def test_the_right_keys_with_their_log_probabilities(
    case: Case, dtype: torch.dtype, isa: str, poisoned_memory: None
) -> None:
    inputs = inputs_of(case, dtype)
    for rule in RULES.values():
        *results, state = ops.select_keys(**inputs, **rule)
        assert_selected(case, inputs, rule, tuple(results), noise_of(inputs, rule, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
def test_gradients(case: Case, dtype: torch.dtype, isa: str, poisoned_memory: None) -> None:
    inputs = inputs_of(case, dtype)
    leaves = leaves_of(inputs)
    indices, *results, _ = ops.select_keys(**(inputs | leaves), count=3, sample=True, replacement=True)
    weights = gradient_weights(case, results)
    if case.name == "extreme_mask_rows" and dtype != torch.float64:
        return  # scores that float32 cannot tell apart
    chosen = [(w, r) for w, r in zip(weights, results, strict=True) if w is not None]
    grads = torch.autograd.grad(loss_of(*map(list, zip(*chosen, strict=True))), list(leaves.values()))
    assert_gradients(case, inputs, indices, weights, dict(zip(leaves, grads, strict=True)))


def test_a_gradient_of_the_scores_alone_touches_the_chosen_keys_alone(isa: str) -> None:
    """The O(L · count) path of top_k equals the dense one."""
    for name in ("plain", "grouped_query", "softcap", "odd_dims", "sinks", "key_lengths"):
        inputs = inputs_of(CASE_BY_NAME[name], torch.float64)
        inputs["query"].requires_grad_()
        inputs["key"].requires_grad_()
        indices, scores, *_ = ops.select_keys(**inputs, count=4)
        weight = torch.randn_like(scores)
        finite = scores.masked_fill(scores == -math.inf, 0)
        actual = torch.autograd.grad((finite * weight).sum(), [inputs["query"], inputs["key"]])
        torch.testing.assert_close(list(actual), exact_gradients(inputs, indices, [weight, None, None, None])[:2])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_choices_do_not_depend_on_threads_or_instruction_set(rule: dict[str, Any]) -> None:
    for name in ("plain", "causal_long", "window", "key_padding_mask", "long_queries"):
        inputs = inputs_of(CASE_BY_NAME[name], torch.float64)
        state = torch.tensor([int(torch.randint(2**62, ())), 0, 0])
        before = torch.get_num_threads()
        results = []
        for threads in (1, 2, 3):
            for isa in ops.cpu_isas():
                torch.set_num_threads(threads)
                ops.force_cpu_isa(isa)
                results.append(ops.select_keys(**inputs, **rule, rng_state=state)[0])
        torch.set_num_threads(before)
        ops.force_cpu_isa("")
        assert all(torch.equal(results[0], x) for x in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_of_equal_scores_the_lowest_index_comes_first(dtype: torch.dtype, isa: str) -> None:
    """Small integers: every score is exact, and most are shared by many keys."""
    query = torch.randint(-1, 2, (1, 2, 70, 4)).to(dtype)
    key = torch.randint(-1, 2, (1, 2, 300, 4)).to(dtype)
    for options in ({}, {"is_causal": True, "causal_alignment": "bottom_right"}, {"window_left": 3}):
        logits = reference.logits(query.double(), key.double(), scale=1.0, **options)
        for count in (1, 2, 7):
            indices = ops.select_keys(query, key, scale=1.0, **options, count=count)[0]
            assert torch.equal(indices, reference.choose_keys(logits, count))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 0, 0, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, ...], rule: dict[str, Any], isa: str, poisoned_memory: None) -> None:
    batch, heads, query_length, key_length = sizes
    query = torch.randn(batch, heads, query_length, 4, requires_grad=True)
    key = torch.randn(batch, heads, key_length, 4, requires_grad=True)
    indices, scores, log_prob, entropy, logsumexp, _ = ops.select_keys(query, key, **rule)
    assert indices.shape == log_prob.shape == (batch, heads, query_length, rule["count"])
    assert (indices == -1).all() and (scores == -math.inf).all() and (log_prob == 0).all()
    assert (entropy == 0).all() and (logsumexp == -math.inf).all()
    (log_prob.sum() + entropy.sum()).backward()
    for x in (query, key):
        assert x.grad is not None and (x.grad == 0).all()


def test_rows_with_nothing_to_attend(isa: str, poisoned_memory: None) -> None:
    query, key = (torch.randn(2, 2, 40, 4, requires_grad=True) for _ in range(2))
    mask = torch.rand(1, 1, 40, 40) > 0.5
    mask[..., ::3, :] = False
    for rule in RULES.values():
        indices, scores, log_prob, entropy, logsumexp, _ = ops.select_keys(query, key, attn_mask=mask, **rule)
        assert (indices[:, :, ::3] == -1).all() and (log_prob[:, :, ::3] == 0).all()
        assert (entropy[:, :, ::3] == 0).all() and (logsumexp[:, :, ::3] == -math.inf).all()
        reached = mask.expand(2, 2, 40, 40).gather(-1, indices.clamp(min=0)) | (indices < 0)
        assert reached.all()
        grad_query, grad_key = torch.autograd.grad(log_prob.sum() + entropy.sum(), [query, key])
        assert (grad_query[:, :, ::3] == 0).all() and grad_key.isfinite().all()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_nan_shows_in_log_prob_and_no_index_leaves_the_keys(rule: dict[str, Any], isa: str) -> None:
    query, key = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70, 8)
    query[0, 0, 40, 3] = math.nan
    indices, _, log_prob, entropy, _, _ = ops.select_keys(query, key, is_causal=True, **rule)
    assert ((indices >= -1) & (indices < 70)).all()
    rows = torch.arange(70) == 40
    assert torch.equal(entropy.isnan().flatten(), rows)
    assert not log_prob[0, 0, ~rows].isnan().any()


def test_any_strides_give_what_contiguous_inputs_give(isa: str) -> None:
    query = torch.randn(2, 2, 18, 12)[:, :, ::2, ::2]
    key = torch.randn(1, 1, 6, 11).transpose(-2, -1).expand(2, 2, 11, 6)
    mask = torch.randn(1, 2, 1, 11).expand(2, 2, 9, 11)
    for rule in RULES.values():
        state = torch.tensor([9, 0, 0])
        leaves = [x.detach().requires_grad_() for x in (query, key)]
        copies = [x.detach().contiguous().requires_grad_() for x in (query, key)]
        first = ops.select_keys(*leaves, attn_mask=mask, **rule, rng_state=state)
        second = ops.select_keys(*copies, attn_mask=mask.contiguous(), **rule, rng_state=state)
        torch.testing.assert_close(first, second)
        grads = [
            torch.autograd.grad(r[2].square().sum() + r[3].sum(), x) for r, x in ((first, leaves), (second, copies))
        ]
        torch.testing.assert_close(*grads)
