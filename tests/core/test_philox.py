"""The dropout bits are Philox4x32-7's, at the counter and in the places that csrc/core/dropout.h documents."""

from __future__ import annotations

import pytest
import torch

MASK = 0xFFFFFFFF


def philox4x32(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    """Salmon et al. 2011, in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def test_plain_philox_matches_random123s_known_answers() -> None:
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32([MASK] * 4, [MASK] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox4x32([0] * 4, [0] * 2, rounds=7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox4x32([MASK] * 4, [MASK] * 2, rounds=7) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.37, 0.5, 0.6, 255 / 256, 1 - 2**-16, 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 3])
def test_keep_mask_is_philox_at_the_documented_counter(offset: int, p: float) -> None:
    batch, heads, rows, keys = 2, 3, 5, 19
    seed = int(torch.randint(2**62, ()))
    keep = torch.ops.torch_attn.dropout_keep_mask(torch.tensor([seed, offset, 0]), batch, heads, rows, keys, p)
    dropped = round(p * 2**16)  # of the 2^16 values, lowest first
    for b in range(batch):
        for h in range(heads):
            high = offset + b * heads + h
            for i in range(rows):
                for j in range(keys):
                    counter = [j // 8, i // 2, high & MASK, high >> 32]
                    words = philox4x32(counter, [seed & MASK, seed >> 32], rounds=7)
                    own = words[2 * (j % 8 // 4) + 1 - i % 2] >> 8 * (2 * (j % 2) + j % 4 // 2) & 0xFF
                    shared = philox4x32(counter, [seed & MASK, seed >> 32], rounds=6)[0] >> 24 ^ 0x80
                    assert keep[b, h, i, j].item() == (own << 8 | shared >= dropped)


def test_a_batch_period_repeats_the_bits() -> None:
    seed = int(torch.randint(2**62, ()))
    own = torch.ops.torch_attn.dropout_keep_mask(torch.tensor([seed, 0, 0]), 6, 2, 9, 10, 0.5)
    repeated = torch.ops.torch_attn.dropout_keep_mask(torch.tensor([seed, 0, 2]), 6, 2, 9, 10, 0.5)
    assert torch.equal(repeated, own[:2].repeat(3, 1, 1, 1)) and not torch.equal(repeated, own)
