"""Attention in a page of readable torch operations: the definition of the library's semantics.

The tests compare every kernel with this in float64. It keeps the (L, S) score matrix and differentiates through plain
autograd, so use it to understand and to check, not to train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def key_positions(
    query_length: int,
    key_length: int,
    *,
    causal_alignment: str = "top_left",
    key_lengths: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Where each query row sits on the key axis: row i at i ("top_left") or at i + S - L ("bottom_right").

    Returns an int64 tensor (1 or B, 1, L, 1); S is ``key_lengths[b]`` where that is given.
    """
    rows = torch.arange(query_length, device=device).view(1, 1, -1, 1)
    if causal_alignment == "top_left":
        return rows
    valid = torch.tensor([key_length], device=device) if key_lengths is None else key_lengths.long()
    return rows + (valid - query_length).view(-1, 1, 1, 1)


def band_mask(
    query_length: int,
    key_length: int,
    *,
    is_causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: str = "top_left",
    key_lengths: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """True where a key is attended, for causal masks, windows and key lengths: bool (1 or B, 1, L, S).

    A row at key position p attends keys p - window_left to p + window_right, both included; ``is_causal`` is
    ``window_right = 0``.
    """
    position = key_positions(
        query_length, key_length, causal_alignment=causal_alignment, key_lengths=key_lengths, device=device
    )
    keys = torch.arange(key_length, device=device).view(1, 1, 1, -1)
    visible = torch.ones_like(position + keys, dtype=torch.bool)
    if is_causal:
        visible = visible & (keys <= position)
    if window_left is not None:
        visible = visible & (keys >= position - window_left)
    if window_right is not None:
        visible = visible & (keys <= position + window_right)
    if key_lengths is not None:
        visible = visible & (keys < key_lengths.view(-1, 1, 1, 1))
    return visible


def logits(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: str = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """What the softmax is taken of: softcap(scale · QKᵀ) + ALiBi + mask, (B, Hq, L, S), −∞ where masked.

    query (B, Hq, L, D), key (B, Hkv, S, D). With ``sinks`` there is one more column, the sink's.
    """
    heads, query_length, head_dim = query.shape[-3:]
    key_length = key.size(-2)
    key = key.repeat_interleave(heads // key.size(-3) if key.size(-3) else 1, -3)

    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(head_dim) if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        position = key_positions(
            query_length,
            key_length,
            causal_alignment=causal_alignment,
            key_lengths=key_lengths,
            device=query.device,
        )
        distance = (position - torch.arange(key_length, device=query.device)).abs()
        scores = scores - alibi_slopes.to(scores.dtype)[..., :, None, None] * distance
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    visible = band_mask(
        query_length,
        key_length,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
        causal_alignment=causal_alignment,
        key_lengths=key_lengths,
        device=query.device,
    )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    return scores


def dropout_scale(dropout_p: float) -> float:
    """What a kept weight is multiplied by: 1 / (1 − p), for the multiple of 2⁻¹⁶ that is nearest to ``dropout_p``. With
    p = 1 none is kept, and any number serves."""
    p = math.floor(dropout_p * 65536.0 + 0.5) / 65536.0
    return 1.0 / (1.0 - p) if p < 1.0 else 1.0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: str = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    keep_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(softcap(scale · QKᵀ) + ALiBi + mask) V.

    Shapes: query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv). The options are those of
    :func:`torch_attn.attention`; ``keep_mask``, bool (B, Hq, L, S), holds the weights that dropout keeps. Returns the
    output (B, Hq, L, Dv), logsumexp (B, Hq, L) and the weights (B, Hq, L, S) after dropout.
    """
    scores = logits(
        query,
        key,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        causal_alignment=causal_alignment,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        key_lengths=key_lengths,
    )
    key_length = key.size(-2)
    value = value.repeat_interleave(query.size(-3) // value.size(-3) if value.size(-3) else 1, -3)

    # A row with nothing to attend: weights 0, logsumexp −inf. Softmax alone would give NaN there, in gradients too.
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    logsumexp = torch.logsumexp(scores.masked_fill(empty, 0.0), -1).masked_fill(empty.squeeze(-1), -math.inf)
    if scores.size(-1) == 0:
        logsumexp = torch.full_like(logsumexp, -math.inf)
    weights = weights[..., :key_length]
    if keep_mask is not None:
        weights = weights * keep_mask * dropout_scale(dropout_p)
    return weights.to(value.dtype) @ value, logsumexp, weights


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    keep_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` of each sequence by itself: :func:`torch_attn.varlen_attention`.

    Shapes: query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, Dv); ``keep_mask`` (B, Hq, longest query, longest key).
    Returns the output (Tq, Hq, Dv) and logsumexp (Hq, Tq); rows after the last sequence are 0 and −∞.
    """
    outs, logsumexps = [], []
    for b in range(cu_seqlens_q.numel() - 1):
        rows = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        keys = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        lengths = (rows.stop - rows.start, keys.stop - keys.start)
        one_out, one_logsumexp, _ = attention(
            *(x.transpose(0, 1).unsqueeze(0) for x in (query[rows], key[keys], value[keys])),
            alibi_slopes=alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes,
            sinks=sinks[b] if sinks is not None and sinks.dim() == 2 else sinks,
            key_lengths=None if key_lengths is None else key_lengths[b : b + 1],
            keep_mask=None if keep_mask is None else keep_mask[b : b + 1, :, : lengths[0], : lengths[1]],
            **options,
        )
        outs.append(one_out[0].transpose(0, 1))
        logsumexps.append(one_logsumexp[0])
    tail = query[int(cu_seqlens_q[-1]) :]
    outs.append(tail.new_zeros(*tail.shape[:2], value.size(-1)))
    logsumexps.append(tail.new_full((tail.size(1), tail.size(0)), -math.inf))
    return torch.cat(outs), torch.cat(logsumexps, 1)


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, key_lengths: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`attention` of each entry with the keys that its blocks hold: :func:`torch_attn.paged_attention`.

    Shapes: query (B, Hq, L, D), caches (blocks, block_size, Hkv, D or Dv). Returns out (B, Hq, L, Dv) and logsumexp.
    """

    def gathered(cache: Tensor, b: int) -> Tensor:
        length = int(key_lengths[b])
        blocks = block_table[b, : -(-length // cache.size(1))].long()
        return cache[blocks].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0)

    options = {"causal_alignment": "bottom_right"} | options
    slopes, sinks = options.pop("alibi_slopes", None), options.pop("sinks", None)
    results = [
        attention(
            query[b : b + 1],
            gathered(key_cache, b),
            gathered(value_cache, b),
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
            sinks=sinks[b] if sinks is not None and sinks.dim() == 2 else sinks,
            **options,
        )[:2]
        for b in range(query.size(0))
    ]
    return torch.cat([out for out, _ in results]), torch.cat([logsumexp for _, logsumexp in results])


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    top_k: int = 0,
    mass_window: int | None = None,
    column_sum: bool = True,
    **options: Any,
) -> dict[str, Tensor | None]:
    """The fields of :class:`torch_attn.AttentionStatistics` by name, of query (B, Hq, L, D) and key (B, Hkv, S, D).

    ``options`` are those of :func:`attention` here, which computes the weights.
    """
    _, logsumexp, weights = attention(query, key, key[..., :0], **options)
    log_weights = torch.where(weights > 0, weights, 1.0).log()
    position = key_positions(
        query.size(-2),
        key.size(-2),
        causal_alignment=options.get("causal_alignment", "top_left"),
        key_lengths=options.get("key_lengths"),
        device=query.device,
    )
    distance = (position - torch.arange(key.size(-2), device=query.device)).abs()
    count = max(top_k, 1)
    padded = torch.nn.functional.pad(weights, (0, count))
    top_weights, top_indices = (x[..., :count] for x in padded.sort(dim=-1, descending=True, stable=True))
    top_indices = top_indices.masked_fill(top_weights == 0, -1)
    return {
        "logsumexp": logsumexp,
        "entropy": -(weights * log_weights).sum(-1),
        "max_weight": top_weights[..., 0],
        "argmax": top_indices[..., 0],
        "mean_distance": (weights * distance).sum(-1),
        "window_mass": None if mass_window is None else (weights * (distance <= mass_window)).sum(-1),
        "top_weights": top_weights if top_k > 0 else None,
        "top_indices": top_indices if top_k > 0 else None,
        "column_sum": weights.sum(-2) if column_sum else None,
    }


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    heads: str | Sequence[int] = "all",
    queries: slice | Sequence[int] | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The weights (B, Hq', L', S) of the chosen heads and rows, or their mean over all heads (B, L', S)."""
    _, _, weights = attention(query, key, key[..., :0], **options)
    if queries is not None:
        weights = weights[:, :, queries]
    if isinstance(heads, str):
        return weights.mean(1) if heads == "mean" else weights
    return weights[:, list(heads)]


NOISE_GROUP = 32  # keys that share a noise number when drawing with replacement


def choose_keys(logits: Tensor, count: int, noise: Tensor | None = None, sink: bool = False) -> Tensor:
    """Indices (B, Hq, L, count) into the columns of ``logits``; −1 where a row has no more candidates.

    ``noise`` is what ``torch.ops.torch_attn.selection_noise`` gives. None: the highest logits, the lowest index first
    among equal ones. Without replacement, (B, Hq, L, columns): the highest logits + g, where g = −log E is Gumbel
    noise. With replacement, (B, Hq, L, count, groups, 2): column j wins a race in which it arrives at E_j / exp(logit),
    by way of groups of 32 columns (``sink``: the last column is a group of its own): the group that arrives first, at
    E / Σ exp(logit), then its member by the uniform number, as if the weights lay side by side on a line.
    """
    if noise is None or noise.dim() == 4:
        values = logits
        if noise is not None:  # relative to the maximum, or rows of huge scores would drown the noise
            values = logits - logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min) - noise.log()
        values, indices = values.sort(dim=-1, descending=True, stable=True)
        indices = indices.masked_fill(values == -math.inf, -1)[..., :count]
        return torch.nn.functional.pad(indices, (0, count - indices.size(-1)), value=-1)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    keys = logits.size(-1) - sink
    groups = noise.size(-2) - sink
    members = torch.nn.functional.pad(weights[..., :keys], (0, groups * NOISE_GROUP - keys))
    members = members.unflatten(-1, (groups, NOISE_GROUP))
    if sink:
        alone = torch.nn.functional.pad(weights[..., keys:], (0, NOISE_GROUP - 1))
        members = torch.cat([members, alone.unsqueeze(-2)], -2)
    arrival = noise[..., 0] / members.sum(-1).unsqueeze(-2)
    first = arrival.argmin(-1, keepdim=True)
    chosen = members.gather(-2, first.expand(*first.shape[:-1], NOISE_GROUP))
    passed = chosen.cumsum(-1) <= noise[..., 1].gather(-1, first) * chosen.sum(-1, keepdim=True)
    indices = (first * NOISE_GROUP).squeeze(-1) + passed.sum(-1)
    if sink:
        indices = torch.where(first.squeeze(-1) == groups, keys, indices)
    return indices.masked_fill(empty, -1)


def hard_attention(
    value: Tensor, logits: Tensor, indices: Tensor, *, renormalise: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What reading the chosen keys gives, once they are chosen.

    ``logits`` (B, Hq, L, columns) have been divided by the temperature; ``indices`` is (B, Hq, L, count). Returns the
    outputs (B, Hq, L, count, Dv), or with ``renormalise`` their mean (B, Hq, L, Dv) weighted by the softmax over the
    chosen logits; log_prob (B, Hq, L, count); and entropy (B, Hq, L).
    """
    value = value.repeat_interleave(logits.size(-3) // value.size(-3) if value.size(-3) else 1, -3)
    value = torch.nn.functional.pad(value, (0, 0, 0, logits.size(-1) - value.size(-2)))  # a sink's is 0
    empty = (logits == -math.inf).all(-1, keepdim=True)
    log_weights = torch.log_softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    weights = log_weights.exp().masked_fill(empty, 0.0)
    entropy = -(weights * log_weights.masked_fill(log_weights == -math.inf, 0.0)).sum(-1)
    one_hot = torch.nn.functional.one_hot(indices + 1, logits.size(-1) + 1)[..., 1:].to(value.dtype)
    output = one_hot @ value.unsqueeze(-3)
    nothing = indices < 0
    log_prob = (one_hot * log_weights.masked_fill(log_weights == -math.inf, 0.0).unsqueeze(-2)).sum(-1)
    if renormalise:
        share = torch.softmax(log_prob.masked_fill(nothing, -math.inf).masked_fill(empty, 0.0), -1)
        output = (share.masked_fill(nothing, 0.0).unsqueeze(-1) * output).sum(-2)
    return output, log_prob, entropy
