"""The functions users call: thin, typed wrappers around the C++ operators, with PyTorch's argument names.

TorchScript compiles a call of either to the operator itself (see the end of the file), so that a saved model runs from
C++ without Python.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.jit._builtins
from torch import Tensor

from .varlen import CausalAlignment, nested_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, same arguments and meaning, on this library's kernels.

    Args:
        query: (..., Hq, L, D), float64, float32, bfloat16 or float16.
        key: (..., Hkv, S, D), of query's dtype and device.
        value: (..., Hkv, S, Dv).
        attn_mask: broadcastable to (..., Hq, L, S); bool (True: attend) or floating (added to the scores).
        dropout_p: probability in [0, 1] of dropping a weight, rounded to a multiple of 2⁻¹⁶; it always applies, also in
            evaluation.
        is_causal: row i attends keys 0 to i (top-left alignment). Unlike PyTorch's, it may be combined with a mask.
        scale: factor of query · key; ``1 / sqrt(D)`` when None.
        enable_gqa: allow Hq to be a multiple of Hkv (grouped-query attention, Ainslie et al. 2023).

    query, key and value may also be nested tensors of layout torch.jagged, each the ``transpose(1, 2)`` of
    (B, ragged length, H, D), without attn_mask; the result is one of query's lengths.

    Returns:
        (..., Hq, L, Dv). A row with no key to attend is 0.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    if query.is_nested or key.is_nested:
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return nested_attention(query, key, value, **options, scale=scale, enable_gqa=enable_gqa)
    if scale is None and enable_gqa is False:
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal)
    return torch.ops.torch_attn.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@overload
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
    causal_alignment: CausalAlignment = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...


@overload
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
    causal_alignment: CausalAlignment = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    causal_alignment: CausalAlignment = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with every option of the kernels: softmax(softcap(scale · QKᵀ) + ALiBi + mask) V.

    Args:
        query: (..., Hq, L, D), float64, float32, bfloat16 or float16. Leading dimensions broadcast. query, key and
            value may also be nested tensors, as in :func:`scaled_dot_product_attention`.
        key: (..., Hkv, S, D), of query's dtype and device.
        value: (..., Hkv, S, Dv).
        attn_mask: broadcastable to (..., Hq, L, S); bool (True: attend) or floating (added). A floating mask receives
            a gradient in its own shape.
        dropout_p: probability in [0, 1] of dropping a weight, rounded to a multiple of 2⁻¹⁶. The bits depend on the
            seed and the weight's place only.
        is_causal: a row at key position p attends no key right of p. May be combined with every other mask.
        scale: factor of query · key; ``1 / sqrt(D)`` when None.
        window_left, window_right: attend keys p − window_left to p + window_right; None: no bound on that side.
        causal_alignment: "top_left" puts row i at key position i, "bottom_right" at i + S − L (S: this entry's key
            length), for is_causal, windows and ALiBi alike.
        alibi_slopes: (Hq) or (B, Hq); adds ``−slope · |p − key|`` (Press et al. 2022).
        softcap: scores become softcap · tanh(score / softcap), before ALiBi and mask; 0: off (Gemma 2).
        sinks: (Hq), a logit per head that joins the softmax's sum and has no value (gpt-oss; Xiao et al. 2024).
        key_lengths: (B) int32 or int64; keys from key_lengths[b] on are not attended.
        enable_gqa: allow Hq to be a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        return_logsumexp: return logsumexp too. In TorchScript call ``torch.ops.torch_attn.attention_with_logsumexp``.

    Returns:
        The output (..., Hq, L, Dv) in query's dtype; a row with no key to attend is 0, with zero gradients. With
        ``return_logsumexp`` also the natural logarithm of the softmax's sum, (..., Hq, L), sink included, float32
        (float64 for float64): differentiable, and −inf for a row with no key.
    """
    # Only what differs from the operator's defaults: each argument given costs a third of a microsecond.
    options: dict[str, Any] = {}
    if scale is not None:
        options["scale"] = scale
    if window_left is not None:
        options["window_left"] = window_left
    if window_right is not None:
        options["window_right"] = window_right
    if causal_alignment != "top_left":
        options["causal_alignment"] = causal_alignment
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if softcap != 0.0:
        options["softcap"] = softcap
    if sinks is not None:
        options["sinks"] = sinks
    if key_lengths is not None:
        options["key_lengths"] = key_lengths
    if enable_gqa is not False:
        options["enable_gqa"] = enable_gqa
    if not (options or return_logsumexp or query.is_nested or key.is_nested):
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal)
    if attn_mask is not None:
        options["attn_mask"] = attn_mask
    if dropout_p != 0.0:
        options["dropout_p"] = dropout_p
    if is_causal is not False:
        options["is_causal"] = is_causal
    if query.is_nested or key.is_nested:
        return nested_attention(query, key, value, **options, return_logsumexp=return_logsumexp)
    op = torch.ops.torch_attn.attention_with_logsumexp if return_logsumexp else torch.ops.torch_attn.attention
    return op(query, key, value, **options)


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """By the operator of the fewest arguments, in their order, and those that are given only: half a microsecond less
    than by name, in calls that take ten."""
    if attn_mask is None and dropout_p == 0.0 and is_causal is False:
        return torch.ops.torch_attn.scaled_dot_product_attention(query, key, value)
    return torch.ops.torch_attn.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)


# What torch.jit.script compiles a call of the function to. It cannot compile keyword-only defaults itself.
torch.jit._builtins._register_builtin(scaled_dot_product_attention, "torch_attn::scaled_dot_product_attention")
torch.jit._builtins._register_builtin(attention, "torch_attn::attention")
