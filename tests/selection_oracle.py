"""How the tests judge select_keys, on the CPU and on the emulated GPU: against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_attn import reference

from .cases import CASES, Case

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


def safe_logsumexp(logits: Tensor) -> Tensor:
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)


def assert_selected(
    case: Case, inputs: dict[str, Any], rule: dict[str, Any], results: tuple[Tensor, ...], noise: Tensor | None
) -> None:
    """select_keys' indices, scores, log_prob, entropy and logsumexp are right; ``noise`` is what it drew."""
    indices, scores, log_prob, entropy, logsumexp = results
    dtype = inputs["query"].dtype
    logits = reference.logits(**doubled(inputs))
    _, _, value = case.tensors(torch.float64)
    sink, coarse = "sinks" in inputs, case.name == "extreme_mask_rows" and dtype != torch.float64
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
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


def gradient_weights(case: Case, results: list[Tensor]) -> list[Any]:
    """Random weights of scores, log_prob, entropy and logsumexp in a loss; None: not in it."""
    weights: list[Any] = [torch.randn_like(x) for x in results]
    if case.name == "extreme_mask_rows":
        weights[0] = weights[3] = None  # torch's derivative of such a logsumexp is wrong
    return weights


def assert_gradients(
    case: Case, inputs: dict[str, Any], indices: Tensor, weights: list[Any], grads: dict[str, Tensor]
) -> None:
    """``grads`` of the weighted sum of what select_keys returned, by the input's name, are exact up to rounding."""
    dtype = inputs["query"].dtype
    exact = dict(zip(leaves_of(inputs), exact_gradients(inputs, indices, weights), strict=True))
    relative = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)
    for name, grad in grads.items():
        wanted, eps = exact[name], torch.finfo(grad.dtype).eps
        scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
        distance = case.key_length if name == "alibi_slopes" else 1
        bound = max(relative * distance, 2 * eps) * scale
        assert (grad.double() - wanted).abs().max().item() <= bound if wanted.numel() else True, name
