"""What attention looks at: the weights, or any part of them, and statistics of them that need no (L, S) matrix.

Both take every option of :func:`torch_attn.attention` but dropout, which is no part of a map. TorchScript compiles a
call of either to its operator (see the end of the file).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.jit._builtins
from torch import Tensor

from .functional import CausalAlignment


class AttentionStatistics(NamedTuple):
    """What :func:`attention_statistics` returns, in float32 (float64 for float64); None where it was not asked for.

    P is the softmax of a row's scores over its keys and, with ``sinks``, the sink. A row with nothing to attend has
    weights 0: its logsumexp is −inf, its indices are −1, everything else is 0.
    """

    logsumexp: Tensor
    """(..., Hq, L): natural logarithm of the softmax's sum, sink included."""
    entropy: Tensor
    """(..., Hq, L): −Σ P log P over the keys, in nats."""
    max_weight: Tensor
    """(..., Hq, L): the largest weight."""
    argmax: Tensor
    """(..., Hq, L) int64: its key; the lowest index among equal scores."""
    mean_distance: Tensor
    """(..., Hq, L): Σ P |p − key|, where p is the row's place on the key axis."""
    window_mass: Tensor | None
    """(..., Hq, L): Σ P over the keys with |p − key| ≤ ``mass_window``."""
    top_weights: Tensor | None
    """(..., Hq, L, top_k): the largest weights in descending order; 0 beyond the keys that the row attends."""
    top_indices: Tensor | None
    """(..., Hq, L, top_k) int64: their keys, the lowest index first among equal scores; −1 beyond."""
    column_sum: Tensor | None
    """(..., Hq, S): Σ P over the rows: how much each key is looked at."""


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: CausalAlignment = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    top_k: int = 0,
    mass_window: int | None = None,
    column_sum: bool = True,
    enable_gqa: bool = False,
) -> AttentionStatistics:
    """Statistics of the attention weights, streamed: memory grows with L and S, not with their product.

    Args:
        query: (..., Hq, L, D), float64, float32, bfloat16 or float16. Leading dimensions broadcast.
        key: (..., Hkv, S, D), of query's dtype and device.
        attn_mask, is_causal, scale, window_left, window_right, causal_alignment: as in :func:`torch_attn.attention`.
        alibi_slopes, softcap, sinks, key_lengths, enable_gqa: likewise.
        top_k: how many of each row's largest weights to return; 0: none.
        mass_window: return each row's mass within so many keys of its own place; None: do not.
        column_sum: return the sums over rows. They cost a second pass.

    Returns:
        :class:`AttentionStatistics`. Everything but the indices is differentiable; the gradient of a largest weight
        flows to the key that holds it. In TorchScript a statistic that was not asked for is a tensor of shape (0).

    Raises:
        RuntimeError: for a shape, dtype or device that does not fit.
        ValueError: for a number out of its range.
    """
    results = torch.ops.torch_attn.attention_statistics(
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
        top_k=top_k,
        mass_window=mass_window,
        column_sum=column_sum,
        enable_gqa=enable_gqa,
    )
    logsumexp, entropy, max_weight, argmax, mean_distance, window, weights, indices, columns = results
    return AttentionStatistics(
        logsumexp,
        entropy,
        max_weight,
        argmax,
        mean_distance,
        None if mass_window is None else window,
        weights if top_k > 0 else None,
        indices if top_k > 0 else None,
        columns if column_sum else None,
    )


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: CausalAlignment = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    logsumexp: Tensor | None = None,
    heads: str | Sequence[int] = "all",
    queries: slice | Sequence[int] | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention weights, or the part of them that is asked for: nothing else is computed or stored.

    Args:
        query: (..., Hq, L, D), float64, float32, bfloat16 or float16. Leading dimensions broadcast.
        key: (..., Hkv, S, D), of query's dtype and device.
        attn_mask, is_causal, scale, window_left, window_right, causal_alignment: as in :func:`torch_attn.attention`.
        alibi_slopes, softcap, sinks, key_lengths, enable_gqa: likewise.
        logsumexp: (..., Hq, L), what :func:`torch_attn.attention` returned for the same query, key and options: saves
            the pass that computes it. No gradient flows to it: the weights are differentiated as the softmax they are.
        heads: "all"; "mean": their mean, summed as the heads are computed; or the indices of the wanted query heads.
        queries: the wanted rows: a slice with a positive step, or indices, negative ones counted from the end, in any
            order; None: all. Masks, windows and ALiBi see each row in its place among all rows. In TorchScript a
            tensor or None.

    Returns:
        (..., Hq', L', S), or (..., L', S) for ``heads="mean"``, in query's dtype. A row sums to 1, less the share of a
        sink; a row with nothing to attend is 0. Differentiable in query, key, float mask, ALiBi slopes and sinks.

    Raises:
        RuntimeError: for a shape, dtype or device that does not fit.
        ValueError: for a number or name out of its range.
        IndexError: for a head or row that there is not.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    return torch.ops.torch_attn.attention_weights(
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
        logsumexp=logsumexp,
        heads=heads if isinstance(heads, str) else list(heads),
        queries=None if queries is None else _row_indices(queries, query),
        enable_gqa=enable_gqa,
    )


def _row_indices(queries: slice | Sequence[int] | Tensor, query: Tensor) -> Tensor:
    if isinstance(queries, Tensor):
        return queries
    length = query.size(-2)
    if isinstance(queries, slice):
        if queries.step is not None and queries.step <= 0:
            raise ValueError(f"attention_weights: queries' slice must have a positive step, but it is {queries.step}.")
        return torch.arange(length, device=query.device)[queries]
    for index in queries:
        if not -length <= index < length:
            raise IndexError(
                f"attention_weights: queries must be rows from {-length} to {length - 1}, but one of them is {index}."
            )
    return torch.tensor(list(queries), dtype=torch.int64, device=query.device)


# What torch.jit.script compiles a call of the function to. It cannot compile keyword-only defaults itself.
torch.jit._builtins._register_builtin(attention_statistics, "torch_attn::attention_statistics")
torch.jit._builtins._register_builtin(attention_weights, "torch_attn::attention_weights")
