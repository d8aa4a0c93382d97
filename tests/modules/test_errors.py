"""Mistakes in a call of MultiheadAttention raise what nn.MultiheadAttention raises: same type, same message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_attn

from .cases import BATCH, EMBED_DIM, HEADS, KEY_LENGTH, QUERY_LENGTH, Case, ours


def random(*sizes: int) -> Tensor:
    return torch.randn(sizes)


def blocked(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.bool)


L, S, N, E = QUERY_LENGTH, KEY_LENGTH, BATCH, EMBED_DIM
MISTAKES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "query_1d": ({}, lambda: {"qkv": (random(E), random(S, N, E), random(S, N, E))}),
    "query_4d": ({}, lambda: {"qkv": (random(1, L, N, E), random(S, N, E), random(S, N, E))}),
    "batched_query_unbatched_key": ({}, lambda: {"qkv": (random(L, N, E), random(S, E), random(S, E))}),
    "unbatched_query_batched_key": ({}, lambda: {"qkv": (random(L, E), random(S, N, E), random(S, N, E))}),
    "padding_1d_for_batched": ({}, lambda: {"key_padding_mask": blocked(S)}),
    "padding_2d_for_unbatched": (
        {},
        lambda: {"qkv": (random(L, E), random(S, E), random(S, E)), "key_padding_mask": blocked(1, S)},
    ),
    "padding_wrong_batch": ({}, lambda: {"key_padding_mask": blocked(N + 1, S)}),
    "padding_wrong_length": ({}, lambda: {"key_padding_mask": blocked(N, S + 1)}),
    "padding_wrong_length_with_appended_keys": (
        {"add_bias_kv": True, "add_zero_attn": True},
        lambda: {"key_padding_mask": blocked(N, S + 1)},
    ),
    "padding_of_integers": ({}, lambda: {"key_padding_mask": blocked(N, S).long()}),
    "mask_of_integers": ({}, lambda: {"attn_mask": blocked(L, S).int()}),
    "mask_1d": ({}, lambda: {"attn_mask": blocked(S)}),
    "mask_4d": ({}, lambda: {"attn_mask": blocked(N, HEADS, L, S)}),
    "mask_wrong_2d_size": ({}, lambda: {"attn_mask": blocked(S, L)}),
    "mask_wrong_3d_size": ({}, lambda: {"attn_mask": blocked(N, L, S)}),
    "mask_wrong_3d_size_unbatched": (
        {},
        lambda: {"qkv": (random(L, E), random(S, E), random(S, E)), "attn_mask": blocked(N * HEADS, L, S)},
    ),
    "mask_wrong_size_under_causal_hint_with_padding": (
        {},
        lambda: {
            "qkv": (random(S, N, E), random(S, N, E), random(S, N, E)),
            "attn_mask": blocked(S, S + 1),
            "key_padding_mask": blocked(N, S),
            "is_causal": True,
        },
    ),
    "causal_without_mask": ({}, lambda: {"is_causal": True}),
    "causal_without_mask_nor_weights": ({}, lambda: {"is_causal": True, "need_weights": False}),
    "query_wrong_width": ({}, lambda: {"qkv": (random(L, N, E + 1), random(S, N, E), random(S, N, E))}),
    "key_value_lengths_differ": ({}, lambda: {"qkv": (random(L, N, E), random(S, N, E), random(S + 1, N, E))}),
    "key_value_lengths_differ_batch_first": (
        {"batch_first": True},
        lambda: {"qkv": (random(N, L, E), random(N, S, E), random(N, S + 1, E))},
    ),
    "key_value_lengths_differ_unbatched": ({}, lambda: {"qkv": (random(L, E), random(S, E), random(S + 1, E))}),
    "key_value_lengths_differ_separate_weights": (
        {"kdim": 6},
        lambda: {"qkv": (random(L, N, E), random(S, N, 6), random(S + 1, N, E))},
    ),
    "key_wrong_width": ({}, lambda: {"qkv": (random(L, N, E), random(S, N, E + 1), random(S, N, E + 1))}),
    "key_wrong_width_separate_weights": (
        {"kdim": 6},
        lambda: {"qkv": (random(L, N, E), random(S, N, 7), random(S, N, E))},
    ),
    "batches_differ": ({}, lambda: {"qkv": (random(L, N, E), random(S, N + 1, E), random(S, N + 1, E))}),
    "dtype_of_inputs": ({}, lambda: {"qkv": tuple(random(L, N, E).double() for _ in range(3))}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_raise_the_error_of_pytorch(name: str) -> None:
    options, make = MISTAKES[name]
    call = make()
    first = (N, L, E) if options.get("batch_first") else (L, N, E)
    other = (N, S) if options.get("batch_first") else (S, N)
    default = (random(*first), random(*other, options.get("kdim", E)), random(*other, E))
    qkv = call.pop("qkv", default)
    theirs = nn.MultiheadAttention(E, HEADS, **options)
    with pytest.raises(Exception) as expected:
        theirs(*qkv, **call)
    with pytest.raises(expected.type) as actual:
        ours(theirs)(*qkv, **call)
    assert actual.type is expected.type
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("arguments", [(0, 2), (8, 0), (8, 3)], ids=str)
def test_impossible_sizes_raise_the_error_of_pytorch(arguments: tuple[int, int]) -> None:
    with pytest.raises(Exception) as expected:
        nn.MultiheadAttention(*arguments)
    with pytest.raises(expected.type) as actual:
        torch_attn.MultiheadAttention(*arguments)
    assert str(actual.value) == str(expected.value)


def test_masks_of_two_kinds_warn_as_pytorch_does() -> None:
    case = Case(attn_mask="bool", key_padding_mask="float")
    module, arguments = case.build(), case.inputs()
    with pytest.warns(
        UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"
    ) as theirs:
        module(**arguments)
    with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated") as mine:
        ours(module)(**arguments)
    assert str(mine[0].message) == str(theirs[0].message)
