"""Attention of sequences of different lengths without padding: packed rows, nested tensors, and paged key/value caches.

Thin, typed wrappers around the C++ operators, as functional.py has; TorchScript compiles a call to the operator itself.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.jit._builtins
from torch import Tensor

CausalAlignment = Literal["top_left", "bottom_right"]


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    block_table: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    block_table: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
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
    block_table: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torch_attn.attention` of B sequences whose rows lie one after the other, without padding.

    The layout is that of ``flash_attn_varlen_func`` and ``torch.nn.attention.varlen.varlen_attn``. Unlike theirs,
    causal masks are top-left here as everywhere in this library: where query and key lengths differ, pass
    ``causal_alignment="bottom_right"`` for theirs. Rows after the last sequence (T may be larger than the last of
    ``cu_seqlens``) are 0 with zero gradients.

    Args:
        query: (Tq, Hq, D), the rows of all sequences; float64, float32, bfloat16 or float16.
        key: (Tk, Hkv, D), of query's dtype and device; with ``block_table`` (blocks, block_size, Hkv, D).
        value: (Tk, Hkv, Dv); with ``block_table`` (blocks, block_size, Hkv, Dv).
        cu_seqlens_q: (B + 1) int32 or int64, from 0 on, not decreasing: sequence b has the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] − 1. Its numbers are checked on the CPU only: a GPU would have to be waited for.
        cu_seqlens_k: the same for key and value; None with ``block_table``.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence. On CUDA the rows of a sequence beyond
            are neither computed nor attended. max_seqlen_k is not read with ``block_table``.
        dropout_p, is_causal, scale, window_left, window_right, softcap: as in :func:`torch_attn.attention`, in each
            sequence by itself. Dropout's bits depend on the seed, the sequence's number and the place in the sequence.
        causal_alignment: "top_left" puts row i of a sequence at key position i, "bottom_right" at i + S − L of its own
            lengths.
        alibi_slopes, sinks: (Hq) or (B, Hq).
        key_lengths: (B) int32 or int64; keys of sequence b from key_lengths[b] on are not attended.
        block_table: (B, blocks of a sequence) int32; where the keys of each sequence lie, as in
            :func:`paged_attention`. Needs ``key_lengths``, and has no gradients.
        enable_gqa: allow Hq to be a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        return_logsumexp: return logsumexp too. In TorchScript call
            ``torch.ops.torch_attn.varlen_attention_with_logsumexp``.

    Returns:
        The output (Tq, Hq, Dv); with ``return_logsumexp`` also (Hq, Tq), float32 (float64 for float64). All
        derivatives of :func:`torch_attn.attention` are there; ``vmap`` is not: add sequences instead.
    """
    options = _given(
        dropout_p=(dropout_p, 0.0),
        is_causal=(is_causal, False),
        scale=(scale, None),
        window_left=(window_left, None),
        window_right=(window_right, None),
        causal_alignment=(causal_alignment, "top_left"),
        alibi_slopes=(alibi_slopes, None),
        softcap=(softcap, 0.0),
        sinks=(sinks, None),
        key_lengths=(key_lengths, None),
        block_table=(block_table, None),
        enable_gqa=(enable_gqa, False),
    )
    ops = torch.ops.torch_attn
    op = ops.varlen_attention_with_logsumexp if return_logsumexp else ops.varlen_attention
    return op(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: CausalAlignment = "bottom_right",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: CausalAlignment = "bottom_right",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: CausalAlignment = "bottom_right",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a key/value cache in blocks (Kwon et al. 2023, "PagedAttention"): decoding and chunked prefill.

    The kernels follow the table where they read keys and values; nothing is gathered before. Forward only.

    Args:
        query: (B, Hq, L, D), the newest rows of each sequence, whose keys are in the cache already; float64, float32,
            bfloat16 or float16. Query rows of different numbers: :func:`varlen_attention` with ``block_table``.
        key_cache: (blocks, block_size, Hkv, D), as vLLM and flash-attn keep it, of any strides but 1 in the last
            dimension. On CUDA's tensor cores block_size must be a power of 2.
        value_cache: (blocks, block_size, Hkv, Dv).
        block_table: (B, blocks of a sequence) int32 or int64: keys i · block_size to (i + 1) · block_size − 1 of
            sequence b lie in block block_table[b, i]. Behind the last key it may hold anything.
        key_lengths: (B) int32 or int64: how many keys sequence b has in the cache, its newest rows included.
        is_causal: row i of L attends the keys up to its own, key_lengths[b] − L + i.
        causal_alignment: "bottom_right": the last row meets the last key, for is_causal, windows and ALiBi alike;
            "top_left": row i lies at key i.
        scale, window_left, window_right, softcap: as in :func:`torch_attn.attention`.
        alibi_slopes, sinks: (Hq) or (B, Hq).
        enable_gqa: allow Hq to be a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        return_logsumexp: return logsumexp too. In TorchScript call
            ``torch.ops.torch_attn.paged_attention_with_logsumexp``.

    Returns:
        The output (B, Hq, L, Dv); with ``return_logsumexp`` also (B, Hq, L), float32 (float64 for float64).

    Raises:
        RuntimeError: an input requires grad, outside ``torch.no_grad()``.
    """
    options = _given(
        is_causal=(is_causal, False),
        scale=(scale, None),
        window_left=(window_left, None),
        window_right=(window_right, None),
        causal_alignment=(causal_alignment, "bottom_right"),
        alibi_slopes=(alibi_slopes, None),
        softcap=(softcap, 0.0),
        sinks=(sinks, None),
        enable_gqa=(enable_gqa, False),
    )
    ops = torch.ops.torch_attn
    op = ops.paged_attention_with_logsumexp if return_logsumexp else ops.paged_attention
    return op(query, key_cache, value_cache, block_table, key_lengths, **options)


def nested_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_logsumexp: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torch_attn.attention` of jagged nested tensors (B, H, ragged length, D), by :func:`varlen_attention`.

    Each is the transpose of (B, ragged length, H, D), whose rows lie together as they are; the results are laid out
    alike, with query's ragged length. Gradients reach the nested tensors.
    """
    if options.pop("attn_mask", None) is not None:
        raise ValueError("attention: attn_mask must be None with nested tensors, whose entries differ in length.")
    (query_rows, query_starts, max_q), (key_rows, key_starts, max_k), (value_rows, value_starts, _) = (
        _packed_rows(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    if key_starts is not value_starts and key_starts.device.type == "cpu" and not torch.equal(key_starts, value_starts):
        raise ValueError("attention: nested key and value must have entries of the same lengths, but they differ.")
    packed = (query_rows, key_rows, value_rows, query_starts, key_starts, max_q, max_k)
    out, logsumexp = torch.ops.torch_attn.varlen_attention_with_logsumexp(*packed, **options)

    def nested(rows: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(rows, query_starts, max_seqlen=max_q).transpose(1, 2)

    return (nested(out), nested(logsumexp.transpose(0, 1))) if return_logsumexp else nested(out)


def _packed_rows(x: Tensor, name: str) -> tuple[Tensor, Tensor, int]:
    """(rows, heads, dim), where each entry's rows start, and the longest entry's length."""
    if not x.is_nested or x.layout is not torch.jagged or x.dim() != 4 or x._ragged_idx != 2:
        what = f"of shape {tuple(x.shape)}" if not x.is_nested else f"a nested tensor of layout {x.layout}"
        raise ValueError(
            f"attention: with nested tensors, {name} must be one of layout torch.jagged, the transpose(1, 2) of "
            f"(batch, ragged length, heads, head_dim), but it is {what}."
        )
    rows = x.transpose(1, 2)
    if rows.lengths() is not None:  # with gaps between its entries
        rows = rows.contiguous()
    return rows.values(), rows.offsets(), rows._get_max_seqlen()


def _given(**options: tuple[Any, Any]) -> dict[str, Any]:
    """Those that are not their default, by name: each argument given to an operator costs time."""
    return {
        name: x for name, (x, default) in options.items() if x is not default and (type(x) is Tensor or x != default)
    }


# What torch.jit.script compiles a call of the function to; see functional.py.
torch.jit._builtins._register_builtin(varlen_attention, "torch_attn::varlen_attention")
torch.jit._builtins._register_builtin(paged_attention, "torch_attn::paged_attention")
