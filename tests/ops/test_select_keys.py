"""select_keys, on each instruction set: the right keys, their log-probabilities, the entropy, and the gradients of it
all, against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_attn import reference

from ..cases import CASE_BY_NAME, CASES, Case

ops = torch.ops.torch_attn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RULES: dict[str, dict[str, Any]] = {
    "highest": {"count": 5},
    "with_replacement": {"count": 3, "sample": True, "replacement": True},
    "without_replacement": {"count": 6, "sample": True, "replacement": False},
}
WITHOUT_DROPOUT = [c for c in CASES if "dropout_p" not in c.options or c.name == "everything"]
FLOAT_OPTIONS = ("attn_mask", "alibi_slopes", "sinks")


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    query, key, _ = case.tensors(dtype)
    options = {name: x for name, x in case.kwargs(dtype).items() if name != "dropout_p"}
    return {"query": query, "key": key, **options}


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


def noise_of(inputs: dict[str, Any], rule: dict[str, Any], state: Tensor) -> Tensor | None:
    if not rule.get("sample"):
        return None
    sizes = (*inputs["query"].shape[:3], inputs["key"].size(2))
    return ops.selection_noise(state, *sizes, rule["count"], rule["replacement"], "sinks" in inputs)


def assert_near_choice(logits: Tensor, indices: Tensor, noise: Tensor | None, sink: bool, tolerance: float) -> None:
    """No candidate beats a chosen one by more than scores may err."""
    best = reference.choose_keys(logits, indices.size(-1), noise, sink)
    assert torch.equal(indices < 0, best < 0)
    if noise is None or noise.dim() == 4:
        values = logits if noise is None else logits - logits.amax(-1, keepdim=True) - noise.log()
        short = values.gather(-1, best.clamp(min=0)) - values.gather(-1, indices.clamp(min=0))
        assert (short.masked_fill(best < 0, 0) <= tolerance).all()
        return
    keys, groups = logits.size(-1) - sink, noise.size(-2) - sink
    weights = torch.softmax(logits.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0), -1)
    members = torch.nn.functional.pad(weights[..., :keys], (0, groups * reference.NOISE_GROUP - keys))
    members = members.unflatten(-1, (groups, -1))
    if sink:
        alone = torch.nn.functional.pad(weights[..., keys:], (0, reference.NOISE_GROUP - 1))
        members = torch.cat([members, alone.unsqueeze(-2)], -2)
    arrival = noise[..., 0] / members.sum(-1).unsqueeze(-2)
    is_sink = indices == keys if sink else torch.zeros_like(indices, dtype=torch.bool)
    chosen = torch.where(is_sink, groups, indices.clamp(min=0) // reference.NOISE_GROUP).unsqueeze(-1)
    late = arrival.gather(-1, chosen).squeeze(-1) / arrival.amin(-1) - 1
    assert (late.masked_fill(indices < 0, 0) <= tolerance).all()
    group = members.gather(-2, chosen.expand(*chosen.shape[:-1], reference.NOISE_GROUP))
    line = torch.nn.functional.pad(group.cumsum(-1) / group.sum(-1, keepdim=True), (1, 0))
    place = torch.where(is_sink, 0, indices.clamp(min=0) % reference.NOISE_GROUP).unsqueeze(-1)
    uniform = noise[..., 1].gather(-1, chosen)
    inside = (line.gather(-1, place) - tolerance <= uniform) & (uniform <= line.gather(-1, place + 1) + tolerance)
    assert (inside.squeeze(-1) | (indices < 0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
def test_the_right_keys_with_their_log_probabilities(
    case: Case, dtype: torch.dtype, isa: str, poisoned_memory: None
) -> None:
    inputs = inputs_of(case, dtype)
    logits = reference.logits(**doubled(inputs))
    _, _, value = case.tensors(torch.float64)
    sink, coarse = "sinks" in inputs, case.name == "extreme_mask_rows" and dtype != torch.float64
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for rule in RULES.values():
        indices, scores, log_prob, entropy, logsumexp, state = ops.select_keys(**inputs, **rule)
        noise = noise_of(inputs, rule, state)
        if dtype == torch.float64:
            assert torch.equal(indices, reference.choose_keys(logits, rule["count"], noise, sink))
        if coarse:  # float32 cannot tell these rows' scores apart
            logits_here, chosen = logits[..., :3, :], [x[..., :3, :] for x in (indices, scores, log_prob)]
            entropy, logsumexp, noise = entropy[..., :3], logsumexp[..., :3], None if noise is None else noise[:, :, :3]
        else:
            logits_here, chosen = logits, [indices, scores, log_prob]
        assert_near_choice(logits_here, chosen[0], noise, sink, tolerance)
        _, exact_log_prob, exact_entropy = reference.hard_attention(value, logits_here, chosen[0])
        torch.testing.assert_close(chosen[2].double(), exact_log_prob, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(entropy.double(), exact_entropy, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(logsumexp.double(), safe_logsumexp(logits_here), rtol=tolerance, atol=tolerance)
        columns = torch.nn.functional.pad(logits_here, (0, 1), value=-math.inf)
        wanted = columns.gather(-1, torch.where(chosen[0] < 0, logits.size(-1), chosen[0]))
        torch.testing.assert_close(chosen[1].double(), wanted, rtol=tolerance, atol=tolerance)


def safe_logsumexp(logits: Tensor) -> Tensor:
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)


def loss_of(weights: list[Tensor], results: list[Tensor]) -> Tensor:
    """Weighted sum of what is finite."""
    pairs = zip(weights, results, strict=True)
    return sum((x.where(x.isfinite(), torch.zeros_like(x)) * w.to(x.dtype)).sum() for w, x in pairs)  # type: ignore[return-value]


def leaves_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    names = ["query", "key", *(n for n in FLOAT_OPTIONS if n in inputs and inputs[n].is_floating_point())]
    return {n: inputs[n].detach().clone().requires_grad_() for n in names}


def exact_gradients(inputs: dict[str, Any], indices: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Of scores, log_prob, entropy and logsumexp of given keys."""
    leaves = leaves_of(doubled(inputs))
    logits = reference.logits(**(doubled(inputs) | leaves))
    empty = (logits == -math.inf).all(-1, keepdim=True)
    _, log_prob, entropy = reference.hard_attention(logits.new_zeros(*inputs["key"].shape[:3], 1), logits, indices)
    finite = logits.masked_fill(empty, 0)
    scores = torch.nn.functional.pad(finite, (0, 1)).gather(-1, torch.where(indices < 0, logits.size(-1), indices))
    logsumexp = finite.logsumexp(-1).masked_fill(empty.squeeze(-1), 0)
    results = [scores, log_prob, entropy, logsumexp]
    chosen = [(w, r) for w, r in zip(weights, results, strict=True) if w is not None]
    grads = torch.autograd.grad(loss_of(*map(list, zip(*chosen, strict=True))), list(leaves.values()))
    return list(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
def test_gradients(case: Case, dtype: torch.dtype, isa: str, poisoned_memory: None) -> None:
    inputs = inputs_of(case, dtype)
    leaves = leaves_of(inputs)
    indices, *results, _ = ops.select_keys(**(inputs | leaves), count=3, sample=True, replacement=True)
    weights: list[Any] = [torch.randn_like(x) for x in results]
    if case.name == "extreme_mask_rows":
        if dtype != torch.float64:
            return  # scores that float32 cannot tell apart
        weights[0] = weights[3] = None  # torch's derivative of such a logsumexp is wrong
    chosen = [(w, r) for w, r in zip(weights, results, strict=True) if w is not None]
    grads = torch.autograd.grad(loss_of(*map(list, zip(*chosen, strict=True))), list(leaves.values()))
    exact = exact_gradients(inputs, indices, weights)
    relative = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
    for (name, leaf), actual, wanted in zip(leaves.items(), grads, exact, strict=True):
        eps = torch.finfo(leaf.dtype).eps
        scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
        distance = case.key_length if name == "alibi_slopes" else 1
        bound = max(relative * distance, 2 * eps) * scale
        assert (actual.double() - wanted).abs().max().item() <= bound if wanted.numel() else True, name


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
        before, isa_before = torch.get_num_threads(), ops.cpu_isa()
        results = []
        for threads in (1, 2, 3):
            for isa in ops.cpu_isas():
                torch.set_num_threads(threads)
                ops.force_cpu_isa(isa)
                results.append(ops.select_keys(**inputs, **rule, rng_state=state)[0])
        torch.set_num_threads(before)
        ops.force_cpu_isa(isa_before)
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
