"""The calls of packed sequences and paged caches that their tests share, and how these are judged.

Lengths are given apart from the other options: those of tests/cases.py, which the definition in torch_attn.reference
takes sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_attn import reference

from .oracle import Call, accumulator_of

ops = torch.ops.torch_attn
CAUSAL = {"is_causal": True}
BOTTOM_RIGHT = {"causal_alignment": "bottom_right"}


@dataclass(frozen=True)
class PackedCase:
    """Sequences of the given lengths; ``tail`` rows after the last belong to none."""

    name: str
    query_lengths: tuple[int, ...] = (37, 0, 1, 70)
    key_lengths: tuple[int, ...] | None = None  # None: those of the queries
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    tail: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[PackedCase, torch.dtype], dict[str, Any]] | None = None  # options that are tensors

    @property
    def batch(self) -> int:
        return len(self.query_lengths)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = (sum(x) + self.tail for x in (self.query_lengths, self.key_lengths or self.query_lengths))
        sizes = ((queries, self.heads, self.head_dim), (keys, self.kv_heads, self.head_dim))
        sizes += ((keys, self.kv_heads, self.value_dim),)
        return tuple(torch.randn(size).to(dtype) for size in sizes)

    def starts(self, integers: torch.dtype = torch.int32) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
        lengths = (self.query_lengths, self.key_lengths or self.query_lengths)
        sums = (torch.tensor([0, *x], dtype=integers).cumsum(0).to(integers) for x in lengths)
        return *sums, *(max(x, default=0) for x in lengths)

    def places(self) -> dict[str, Any]:
        """The same, as attention_forward takes it."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return dict(zip(names, self.starts(), strict=True))

    def kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        return {**self.options, **(self.draw(self, dtype) if self.draw else {})}

    def __str__(self) -> str:
        return self.name


def per_head(name: str, *, by_sequence: bool = False) -> Callable[[PackedCase, torch.dtype], dict[str, Any]]:
    def draw(case: PackedCase, dtype: torch.dtype) -> dict[str, Any]:
        sizes = (case.batch, case.heads) if by_sequence else (case.heads,)
        return {name: torch.rand(sizes).to(accumulator_of(dtype))}

    return draw


def used_keys(case: PackedCase, dtype: torch.dtype) -> dict[str, Any]:
    return {"key_lengths": torch.tensor([max(0, n - 5) for n in case.key_lengths or case.query_lengths])}


def everything(case: PackedCase, dtype: torch.dtype) -> dict[str, Any]:
    slopes, sinks = (per_head(n, by_sequence=True)(case, dtype) for n in ("alibi_slopes", "sinks"))
    return slopes | sinks | used_keys(case, dtype)


SHORT = {"query_lengths": (3, 0, 1, 7, 2), "key_lengths": (3, 2, 200, 90, 0)}
PACKED_CASES = [
    PackedCase("plain"),
    PackedCase("causal", options=CAUSAL, query_lengths=(130, 5, 0, 70), head_dim=64, value_dim=64),
    PackedCase("one_sequence", query_lengths=(90,)),
    PackedCase(
        "more_keys_bottom_right", query_lengths=(9, 33, 0, 2), key_lengths=(90, 33, 7, 0), options=CAUSAL | BOTTOM_RIGHT
    ),
    PackedCase("more_queries", query_lengths=(60, 33), key_lengths=(20, 0), options=CAUSAL | BOTTOM_RIGHT),
    PackedCase("window", query_lengths=(150, 20), options={"window_left": 9, "window_right": 4}),
    PackedCase("grouped_causal", heads=4, kv_heads=1, options=CAUSAL, query_lengths=(120, 3, 65)),
    PackedCase("odd_dims", head_dim=7, value_dim=5),
    PackedCase("tail", tail=6, options=CAUSAL, draw=per_head("sinks")),
    PackedCase("used_keys", draw=used_keys, options=CAUSAL | BOTTOM_RIGHT),
    PackedCase("softcap", options={"softcap": 3.0}),
    PackedCase("alibi_of_sequences", draw=per_head("alibi_slopes", by_sequence=True)),
    PackedCase("dropout", options={"dropout_p": 0.3}),
    PackedCase("decode", **SHORT, heads=4, options=CAUSAL | BOTTOM_RIGHT),
    PackedCase(
        "everything",
        **{"heads": 4, "kv_heads": 2, "tail": 3, "query_lengths": (100, 0, 2, 40), "key_lengths": (120, 8, 60, 40)},
        draw=everything,
        options=CAUSAL | {"window_left": 50, "softcap": 5.0, "dropout_p": 0.2, "scale": 0.4},
    ),
]
PACKED_BY_NAME = {case.name: case for case in PACKED_CASES}


def small(case: PackedCase) -> PackedCase:
    """The same call at a size that numerical differentiation can afford."""
    lengths = {"query_lengths": (2, 0, 3), "key_lengths": (3, 1, 2) if case.key_lengths else None}
    options = dict(case.options) | ({"window_left": 1} if "window_left" in case.options else {})
    sizes = lengths | {"head_dim": 2, "value_dim": 1, "tail": min(case.tail, 1), "options": options}
    if case.draw in (used_keys, everything):
        sizes |= {"query_lengths": (6, 0, 2), "key_lengths": (7, 1, 2)}
    return PackedCase(**{**case.__dict__, **sizes})


@dataclass
class PackedCall(Call):
    """One call of packed rows, (T, H, D)."""

    case: PackedCase

    @classmethod
    def drawn(cls, case: PackedCase, dtype: torch.dtype, with_grad_logsumexp: bool = True) -> PackedCall:
        query, key, value = case.tensors(dtype)
        grad_out = torch.randn(*query.shape[:2], case.value_dim).to(dtype)
        grad_logsumexp = torch.randn(case.heads, query.size(0), dtype=accumulator_of(dtype))
        inputs = (query, key, value, case.kwargs(dtype), grad_out)
        return cls(*inputs, grad_logsumexp if with_grad_logsumexp else None, case)

    def longest_key(self) -> int:
        return self.case.starts()[3]

    def reference(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], keep_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        starts = self.case.starts()[:2]
        return reference.varlen_attention(query, key, value, *starts, **options, keep_mask=keep_mask)

    def kernel(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        places = {n: x.to(query.device) if isinstance(x, Tensor) else x for n, x in self.case.places().items()}
        out, logsumexp, rng_state = ops.attention_forward(*inputs, **options, **places)
        keep = None
        if (p := options.get("dropout_p", 0.0)) > 0:
            sizes = (self.case.batch, self.case.heads, *self.case.starts()[2:])
            keep = ops.dropout_keep_mask(rng_state, *sizes, p)
        return out.squeeze(0).transpose(0, 1), logsumexp.squeeze(0), keep


@dataclass(frozen=True)
class PagedCase:
    """A cache in blocks, of which each sequence has as many as it needs, in any order."""

    name: str
    key_lengths: tuple[int, ...] = (70, 0, 1, 33)
    query_length: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    options: dict[str, Any] = field(default_factory=lambda: dict(CAUSAL))
    draw: Callable[[PagedCase, torch.dtype], dict[str, Any]] | None = None

    @property
    def batch(self) -> int:
        return len(self.key_lengths)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """query, key_cache, value_cache, block_table, key_lengths; blocks in no use hold NaN."""
        needed = [-(-n // self.block_size) for n in self.key_lengths]
        blocks = sum(needed) + 2
        places = torch.randperm(blocks)[: sum(needed)].to(torch.int32).split(needed)
        table = torch.full((self.batch, max(needed) + 1), -7, dtype=torch.int32)
        caches = [torch.full((blocks, self.block_size, self.kv_heads, d), torch.nan) for d in self.dims()]
        for b, (used, length) in enumerate(zip(places, self.key_lengths, strict=True)):
            table[b, : len(used)] = used
            for cache in caches:
                for i in range(length):
                    cache[used[i // self.block_size], i % self.block_size] = torch.randn(cache.shape[2:])
        query = torch.randn(self.batch, self.heads, self.query_length, self.head_dim)
        return *(x.to(dtype) for x in (query, *caches)), table, torch.tensor(self.key_lengths, dtype=torch.int32)

    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.value_dim

    def kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        return {**self.options, **(self.draw(self, dtype) if self.draw else {})}

    def __str__(self) -> str:
        return self.name


def slopes_and_sinks(case: PagedCase, dtype: torch.dtype) -> dict[str, Any]:
    numbers = torch.rand(2, case.batch, case.heads).to(accumulator_of(dtype))
    return {"alibi_slopes": numbers[0], "sinks": numbers[1]}


PAGED_CASES = [
    PagedCase("decode"),
    PagedCase("decode_in_place", block_size=64, head_dim=64, value_dim=64, key_lengths=(200, 64, 3)),
    PagedCase("decode_long", key_lengths=(1500, 40), heads=8, head_dim=32, value_dim=32),
    PagedCase("one_block", key_lengths=(5,), block_size=8),
    PagedCase("odd_blocks", block_size=7, head_dim=5, value_dim=3, query_length=3),
    PagedCase("prefill", query_length=40, key_lengths=(170, 40, 61), block_size=32),
    PagedCase("prefill_more_rows_than_keys", query_length=20, key_lengths=(7, 90)),
    PagedCase("window", query_length=5, options=CAUSAL | {"window_left": 9}),
    PagedCase("not_causal", query_length=33, options={"softcap": 4.0}, kv_heads=4),
    PagedCase(
        "everything", query_length=18, options=CAUSAL | {"window_left": 30, "softcap": 4.0}, draw=slopes_and_sinks
    ),
]


@dataclass
class PagedCall(Call):
    """One call of a paged cache; it has no backward."""

    block_table: Tensor
    key_lengths: Tensor

    @classmethod
    def drawn(cls, case: PagedCase, dtype: torch.dtype) -> PagedCall:
        query, key_cache, value_cache, table, lengths = case.tensors(dtype)
        return cls(query, key_cache, value_cache, case.kwargs(dtype), None, None, table, lengths)

    def reference(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], keep_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return reference.paged_attention(query, key, value, self.block_table, self.key_lengths, **options)

    def kernel(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = (query, key, value, self.block_table.to(query.device), self.key_lengths.to(query.device))
        return *ops.paged_attention_with_logsumexp(*inputs, **options, enable_gqa=True), None
