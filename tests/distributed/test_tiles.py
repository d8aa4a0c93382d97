"""Which calls a rank makes: they cover every pair that attends once, and in balanced layouts take the same work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_attn.distributed import Layout
from torch_attn.distributed.tiles import Tile, tiles_between
from torch_attn.reference import band_mask

from .ring_cases import LAYOUTS, rows_of


def pairs_of(tile: Tile) -> Tensor:
    """Which of its rows attend which of its keys."""
    rows, keys = tile.row_end - tile.row_begin, tile.key_end - tile.key_begin
    return band_mask(rows, keys, window_left=tile.window_left, window_right=tile.window_right)[0, 0]


def draw_window(rows: int) -> int | None:
    return [None, 0, 1, int(torch.randint(2, rows + 1, ()))][int(torch.randint(4, ()))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_that_attends_is_in_one_call(layout: Layout, world_size: int) -> None:
    for _ in range(40):
        rows, keys = (2 * world_size * size for size in torch.randint(1, 5, (2,)).tolist())
        left, right = (draw_window(rows) for _ in range(2))
        attended = torch.zeros(rows, keys, dtype=torch.int64)
        for query_rank in range(world_size):
            for key_rank in range(world_size):
                own_rows = torch.tensor(rows_of(layout, rows, query_rank, world_size))
                own_keys = torch.tensor(rows_of(layout, keys, key_rank, world_size))
                sizes = (rows // world_size, keys // world_size, query_rank, key_rank, world_size)
                for tile in tiles_between(layout, *sizes, left, right):
                    pairs = pairs_of(tile)
                    assert pairs.any(1).all() and pairs.any(0).all(), "rows and keys that are not needed"
                    here, there = own_rows[tile.row_begin : tile.row_end], own_keys[tile.key_begin : tile.key_end]
                    attended[here[:, None], there] += pairs
        exact = band_mask(rows, keys, window_left=left, window_right=right)[0, 0]
        assert torch.equal(attended, exact.long()), (layout, world_size, rows, keys, left, right)


def work(layout: Layout, rows: int, world_size: int) -> Tensor:
    """(ranks, rounds): pairs that each rank computes in each round of a causal ring."""

    def of(rank: int, step: int) -> int:
        owner = (rank - step) % world_size
        tiles = tiles_between(layout, rows, rows, rank, owner, world_size, None, 0)
        return sum(int(pairs_of(tile).sum()) for tile in tiles)

    return torch.tensor([[of(rank, step) for step in range(world_size)] for rank in range(world_size)])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_causal_work_is_balanced_in_every_round(world_size: int) -> None:
    rows = 32
    zigzag, striped = work("zigzag", rows, world_size), work("striped", rows, world_size)
    assert (zigzag == zigzag[0]).all(), "equal"
    assert (striped.amax(0) - striped.amin(0) <= rows).all(), "equal up to one key per row"
    contiguous = work("contiguous", rows, world_size)
    assert contiguous[0, 1:].sum() == 0, "the first rank waits from its second round on"
    total = (rows * world_size) * (rows * world_size + 1) // 2
    assert zigzag.sum() == striped.sum() == contiguous.sum() == total


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_zigzag_takes_one_call_a_round(world_size: int) -> None:
    for rank in range(world_size):
        for owner in range(world_size):
            assert len(tiles_between("zigzag", 32, 32, rank, owner, world_size, None, 0)) == 1
            assert len(tiles_between("zigzag", 32, 32, rank, owner, world_size, None, None)) <= 2
