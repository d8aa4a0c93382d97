"""The noise of hard attention is Philox's, at the counters and by the formulas that csrc/core/selection.h documents."""

from __future__ import annotations

import math

import pytest
import torch

from .test_philox import MASK, philox4x32


def exponential(word: int) -> float:
    return -math.log1p(-(word + 0.5) / 2**32)


@pytest.mark.parametrize("offset", [0, 2**32 - 3])
@pytest.mark.parametrize("sink", [False, True])
def test_noise_is_philox_at_the_documented_counters(offset: int, sink: bool) -> None:
    batch, heads, rows, keys, count = 2, 2, 3, 70, 2
    seed = int(torch.randint(2**62, ()))
    key = [seed & MASK, seed >> 32]
    state = torch.tensor([seed, offset, 0])
    grouped = torch.ops.torch_attn.selection_noise(state, batch, heads, rows, keys, count, True, sink)
    single = torch.ops.torch_attn.selection_noise(state, batch, heads, rows, keys, count, False, sink)
    assert grouped.shape == (batch, heads, rows, count, 3 + sink, 2) and single.shape == (
        batch,
        heads,
        rows,
        keys + sink,
    )
    for b in range(batch):
        for h in range(heads):
            high = offset + b * heads + h
            for i in range(rows):
                for j in range(keys + sink):
                    words = philox4x32([0xC0000000 | j // 4, i, high & MASK, high >> 32], key)
                    assert math.isclose(single[b, h, i, j], exponential(words[j % 4]), rel_tol=1e-12)
                for sample in range(count):
                    shifted = high + (sample << 32)
                    for g in range(3 + sink):
                        words = philox4x32([0x80000000 | g // 2, i, shifted & MASK, shifted >> 32], key)
                        e, u = grouped[b, h, i, sample, g].tolist()
                        assert math.isclose(e, exponential(words[g % 2 * 2]), rel_tol=1e-12)
                        assert u == (words[g % 2 * 2 + 1] >> 8) / 2**24


def test_opcheck() -> None:
    for replacement in (False, True):
        args = (torch.tensor([3, 0, 0]), 2, 2, 5, 40, 3, replacement, True)
        torch.library.opcheck(torch.ops.torch_attn.selection_noise.default, args)
