"""docs/migrating.md is right about other libraries: each of its translations gives what their docstrings define (those
of flash-attn 2 and xFormers 0.0.35), spelled out here as a mask over (L, S)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from torch_attn import MultiheadAttention, attention, attention_weights, paged_attention, varlen_attention
from torch_attn import reference as definition

B, H, L, S, D = 2, 4, 5, 8, 6
SIZES = [(L, S), (S, L), (L, L)]


def heads_first(length: int, heads: int = H) -> Tensor:
    """As a (B, length, heads, D) of flash-attn and xFormers comes out of transpose(1, 2)."""
    return torch.randn(B, length, heads, D, dtype=torch.float64).transpose(1, 2)


def reference(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return definition.attention(query, key, value, attn_mask=attn_mask)[0]


def places(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    """i and j of the score of query i and key j."""
    return torch.arange(rows).unsqueeze(1), torch.arange(keys)


def assert_attends(allowed: Tensor, rows: int, keys: int, **translation: Any) -> None:
    query, key, value = heads_first(rows), heads_first(keys), heads_first(keys)
    assert_close(attention(query, key, value, **translation), reference(query, key, value, attn_mask=allowed))


@pytest.mark.parametrize("rows,keys", SIZES)
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1), (-1, 0), (2, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attns_causal_masks_and_windows(causal: bool, window: tuple[int, int], rows: int, keys: int) -> None:
    """ "causal=True, the causal mask is aligned to the bottom right corner"; a query at i attends keys
    "[i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k - seqlen_q + window_size[1]] inclusive"."""
    i, j = places(rows, keys)
    allowed = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        allowed &= j <= i + keys - rows
    if window[0] >= 0:
        allowed &= j >= i + keys - rows - window[0]
    if window[1] >= 0:
        allowed &= j <= i + keys - rows + window[1]
    left, right = (None if bound < 0 else bound for bound in window)
    translation = {"is_causal": causal, "window_left": left, "window_right": right}
    assert_attends(allowed, rows, keys, causal_alignment="bottom_right", **translation)


def test_flash_attns_alibi_is_aligned_at_the_bottom_right() -> None:
    """ "A bias of (-alibi_slope * |i + seqlen_k - seqlen_q - j|) is added"."""
    query, key, value = heads_first(L), heads_first(S), heads_first(S)
    slopes = torch.rand(B, H)
    i, j = places(L, S)
    bias = -slopes.double()[:, :, None, None] * (i + S - L - j).abs()
    actual = attention(query, key, value, alibi_slopes=slopes, causal_alignment="bottom_right")
    assert_close(actual, reference(query, key, value, attn_mask=bias))


def test_flash_attns_grouped_heads_and_logsumexp() -> None:
    """Query heads 0, 1 attend to key head 0, and 2, 3 to key head 1; softmax_lse is (B, H, L)."""
    query, key, value = heads_first(L), heads_first(S, 2), heads_first(S, 2)
    out, logsumexp = attention(query, key, value, enable_gqa=True, return_logsumexp=True)
    repeated = key.repeat_interleave(2, 1)
    assert_close(out, reference(query, repeated, value.repeat_interleave(2, 1)))
    assert_close(logsumexp, (query @ repeated.mT / D**0.5).logsumexp(-1))


def test_flash_attns_cache_with_lengths() -> None:
    """The L newest rows of each entry are its last: causal masks end at cache_seqlens."""
    lengths = torch.tensor([S, L + 1])
    query, key, value = heads_first(L), heads_first(S), heads_first(S)
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    actual = attention(query, key, value, key_lengths=lengths, **options)
    for entry, length in enumerate(lengths.tolist()):
        one = slice(entry, entry + 1)
        i, j = places(L, length)
        cached = (query[one], key[one, :, :length], value[one, :, :length])
        assert_close(actual[one], reference(*cached, attn_mask=j <= i + length - L))


def test_the_packed_three_come_apart() -> None:
    packed = torch.randn(B, L, 3, H, D)
    for x, place in zip(packed.transpose(1, 3).unbind(2), range(3), strict=True):
        assert torch.equal(x, packed[:, :, place].transpose(1, 2))


@pytest.mark.parametrize("rows,keys", SIZES)
def test_xformers_masks(rows: int, keys: int) -> None:
    i, j = places(rows, keys)
    shift, bottom_right = keys - rows, {"causal_alignment": "bottom_right"}
    assert_attends(j <= i, rows, keys, is_causal=True)
    assert_attends(j <= i + shift, rows, keys, is_causal=True, **bottom_right)
    # tril(shift) and triu(shift − window_size + 1)
    local = (j <= i + shift) & (j >= i + shift - 3 + 1)
    assert_attends(local, rows, keys, is_causal=True, window_left=3 - 1, **bottom_right)
    # "q - window_left <= k + s <= q + window_right, with s = num_queries - num_keys"
    local = (i - 2 <= j - shift) & (j - shift <= i + 1)
    assert_attends(local, rows, keys, window_left=2, window_right=1, **bottom_right)


def test_xformers_five_dimensions_are_grouped_heads() -> None:
    query = torch.randn(B, L, 2, H // 2, D, dtype=torch.float64)
    key = torch.randn(B, S, 2, 1, D, dtype=torch.float64).expand(-1, -1, -1, H // 2, -1)
    whole = [x.flatten(2, 3).transpose(1, 2) for x in (query, key, key)]
    one = key[:, :, :, 0].transpose(1, 2)
    assert_close(attention(whole[0], one, one, enable_gqa=True), reference(*whole))


def test_xformers_causal_mask_with_a_bias() -> None:
    query, key, value = heads_first(L), heads_first(S), heads_first(S)
    bias = torch.randn(B, H, L, S, dtype=torch.float64)
    i, j = places(L, S)
    expected = reference(query, key, value, attn_mask=bias.masked_fill(j > i, float("-inf")))
    assert_close(attention(query, key, value, is_causal=True, attn_mask=bias), expected)


@pytest.fixture
def module() -> nn.MultiheadAttention:
    module = MultiheadAttention(H * D, H, batch_first=True, dtype=torch.float64)
    nn.init.eye_(module.out_proj.weight)
    return module


@pytest.mark.parametrize("causal", [False, True])
def test_the_modules_masks_as_a_function_takes_them(module: nn.MultiheadAttention, causal: bool) -> None:
    x = torch.randn(B, L, H * D, dtype=torch.float64)
    padding = torch.arange(L) >= torch.tensor([[L], [2]])
    blocked = torch.rand(B * H, L, L) > 0.7
    blocked[..., 0] = False
    if causal:
        blocked = torch.ones(L, L, dtype=torch.bool).triu(1)
    expected, expected_weights = module(x, x, x, key_padding_mask=padding, attn_mask=blocked, is_causal=causal)
    query, key, value = (
        y.unflatten(2, (H, D)).transpose(1, 2) for y in nn.functional.linear(x, module.in_proj_weight).chunk(3, -1)
    )
    options = {"is_causal": True} if causal else {"attn_mask": ~blocked.view(B, H, L, L)}
    out = attention(query, key, value, key_lengths=(~padding).sum(1), **options)
    assert_close(out.transpose(1, 2).flatten(2), expected)
    weights = attention_weights(query, key, key_lengths=(~padding).sum(1), heads="mean", **options)
    assert_close(weights, expected_weights)


QUERIES, KEYS = [3, 1, 4], [5, 2, 4]  # lengths of packed sequences
CAUSAL: dict[str, dict[str, Any]] = {
    "no": {},
    "top_left": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}


def packed(lengths: list[int]) -> Tensor:
    """(total, H, D)"""
    return torch.randn(sum(lengths), H, D, dtype=torch.float64)


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, causal: str) -> Tensor:
    """Each sequence by itself, as flash-attn's and xFormers' docstrings say of packed ones."""
    outputs = []
    for sequence in zip(query.split(QUERIES), key.split(KEYS), value.split(KEYS), strict=True):
        rows, keys = len(sequence[0]), len(sequence[1])
        i, j = places(rows, keys)
        last = {"no": torch.tensor(keys), "top_left": i, "bottom_right": i + keys - rows}[causal]
        out = reference(*(x.transpose(0, 1).unsqueeze(0) for x in sequence), attn_mask=(j <= last).expand(rows, keys))
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def blocks(x: Tensor, size: int = 2) -> tuple[Tensor, Tensor]:
    """A cache (blocks, size, H, D), and the table that says where each sequence's blocks lie."""
    cache, table = [], torch.zeros(len(KEYS), 3, dtype=torch.int32)
    for sequence, keys in enumerate(x.split(KEYS)):
        for place, block in enumerate(keys.split(size)):
            table[sequence, place] = len(cache)
            cache.append(torch.cat([block, torch.zeros(size - len(block), H, D, dtype=x.dtype)]))
    return torch.stack(cache), table


@pytest.mark.parametrize("causal", CAUSAL)
def test_packed_sequences_of_both(causal: str) -> None:
    query, key, value = packed(QUERIES), packed(KEYS), packed(KEYS)
    sizes = (starts(QUERIES), starts(KEYS), max(QUERIES), max(KEYS))
    actual = varlen_attention(query, key, value, *sizes, **CAUSAL[causal])
    assert_close(actual, one_by_one(query, key, value, causal))


@pytest.mark.parametrize("causal", ["no", "bottom_right"])
def test_xformers_padded_keys(causal: str) -> None:
    query, key, value = packed(QUERIES), packed(KEYS), packed(KEYS)
    padding, lengths = 6, torch.tensor(KEYS)
    padded = [torch.full((len(KEYS), padding, H, D), float("nan"), dtype=torch.float64) for _ in range(2)]
    for into, x in zip(padded, (key, value), strict=True):
        for sequence, rows in enumerate(x.split(KEYS)):
            into[sequence, : len(rows)] = rows
    sizes = (starts(QUERIES), torch.arange(len(KEYS) + 1, dtype=torch.int32) * padding, max(QUERIES), padding)
    flat = [x.flatten(0, 1) for x in padded]
    actual = varlen_attention(query, *flat, *sizes, key_lengths=lengths, **CAUSAL[causal])
    assert_close(actual, one_by_one(query, key, value, causal))


def test_flash_attns_block_table() -> None:
    query, key, value = packed(QUERIES), packed(KEYS), packed(KEYS)
    (key_cache, table), (value_cache, _) = blocks(key), blocks(value)
    options = {"key_lengths": starts(KEYS).diff(), "block_table": table, **CAUSAL["bottom_right"]}
    sizes = (starts(QUERIES), None, max(QUERIES), max(KEYS))
    actual = varlen_attention(query, key_cache, value_cache, *sizes, **options)
    assert_close(actual, one_by_one(query, key, value, "bottom_right"))


def test_flash_attns_paged_cache() -> None:
    newest = 2
    query = torch.randn(len(KEYS), newest, H, D, dtype=torch.float64).transpose(1, 2)
    key, value = packed(KEYS), packed(KEYS)
    (key_cache, table), (value_cache, _) = blocks(key), blocks(value)
    actual = paged_attention(query, key_cache, value_cache, table, torch.tensor(KEYS), is_causal=True)
    for sequence, (keys, values) in enumerate(zip(key.split(KEYS), value.split(KEYS), strict=True)):
        i, j = places(newest, len(keys))
        cached = (x.transpose(0, 1).unsqueeze(0) for x in (keys, values))
        one = slice(sequence, sequence + 1)
        assert_close(actual[one], reference(query[one], *cached, attn_mask=j <= i + len(keys) - newest))
