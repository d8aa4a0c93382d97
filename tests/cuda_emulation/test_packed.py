"""Packed sequences and paged caches in the emulated CUDA kernels: as accurate as each sequence by itself."""

from __future__ import annotations

import pytest
import torch

from ..oracle import assert_accurate
from ..varlen_cases import (
    BOTTOM_RIGHT,
    CAUSAL,
    PackedCall,
    PackedCase,
    PagedCall,
    PagedCase,
    per_head,
    slopes_and_sinks,
)
from .emulation import Device
from .packed import PackedRun, PagedRun
from .test_kernels import FUSED, random_rng_state, random_seed


def slopes_of_sequences_and_sinks(case: PackedCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return per_head("alibi_slopes", by_sequence=True)(case, dtype) | per_head("sinks")(case, dtype)


FULL = CAUSAL | {"window_left": 40, "softcap": 5.0, "dropout_p": 0.2}
TWO_TILES = {"query_lengths": (70, 0, 3), "key_lengths": (70, 9, 90)}
PACKED = [
    PackedCase("plain", query_lengths=(70, 0, 1, 20), heads=1, kv_heads=1),
    PackedCase("causal_bottom_right", **TWO_TILES, heads=2, kv_heads=1, options=CAUSAL | BOTTOM_RIGHT, tail=5),
    PackedCase("everything", **TWO_TILES, heads=1, kv_heads=1, options=FULL, draw=slopes_of_sequences_and_sinks),
]
TIERS = [("simt", torch.float32), ("sm80", torch.bfloat16)]


def check_packed(device: Device, call: PackedCall, tier: str, deterministic: bool = True) -> PackedRun:
    device.force_tier(tier)
    device.configure(random_seed(), multiprocessors=108 if deterministic else 1)
    run = PackedRun(device, call, random_rng_state(), deterministic=deterministic)
    results = run.forward() | run.backward()
    keep = run.keep_mask() if run.problem.dropout_p > 0 else None
    assert_accurate(call, results, keep, rounds_weights=tier != "simt")
    return run


@pytest.mark.parametrize(("tier", "dtype"), TIERS, ids=["simt", "sm80"])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences(case: PackedCase, tier: str, dtype: torch.dtype, device: Device) -> None:
    check_packed(device, PackedCall.drawn(case, dtype), tier)


@pytest.mark.parametrize("tier", ["sm80", "sm90"])
@pytest.mark.parametrize("case", PACKED[:2], ids=str)
def test_packed_sequences_with_fused_gradients(case: PackedCase, tier: str, device: Device) -> None:
    run = check_packed(device, PackedCall.drawn(case, torch.bfloat16), tier, deterministic=False)
    assert run.backward_tiers[tier] == FUSED


def test_packed_sequences_of_few_rows_split_their_keys(device: Device) -> None:
    case = PackedCase("decode", (1, 0, 3, 2), (600, 5, 70, 0), 4, 2, options=CAUSAL | BOTTOM_RIGHT)
    call = PackedCall.drawn(case, torch.bfloat16, with_grad_logsumexp=False)
    call.grad_out = None
    device.force_tier("sm80")
    device.configure(random_seed())
    run = PackedRun(device, call, (0, 0))
    assert "parts" in run.tiers()["sm80"]
    assert_accurate(call, run.forward(), None, rounds_weights=True)


PAGED = [
    PagedCase("decode", key_lengths=(300, 0, 17), block_size=16),
    PagedCase("prefill", query_length=70, key_lengths=(130, 75), block_size=32, heads=1, kv_heads=1),
    PagedCase(
        "everything",
        key_lengths=(90, 40),
        query_length=20,
        options=CAUSAL | {"window_left": 30, "softcap": 4.0},
        draw=slopes_and_sinks,
    ),
]


@pytest.mark.parametrize(("tier", "dtype"), TIERS, ids=["simt", "sm80"])
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged_caches(case: PagedCase, tier: str, dtype: torch.dtype, device: Device) -> None:
    call = PagedCall.drawn(case, dtype)
    device.force_tier(tier)
    device.configure(random_seed())
    assert_accurate(call, PagedRun(device, call).forward(), None, rounds_weights=tier == "sm80")


def test_blocks_of_any_size_are_served_by_the_portable_tier(device: Device) -> None:
    call = PagedCall.drawn(PagedCase("odd_blocks", block_size=7, query_length=3), torch.bfloat16)
    run = PagedRun(device, call)
    assert run.tiers()["sm80"] == "the blocks of a paged cache must have a power of two of rows"
    assert_accurate(call, run.forward(), None)
