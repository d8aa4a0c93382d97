"""What the rows of one shard attend of another's keys, as calls of the kernels: each a few rows, a few keys, a window.

Causal masks and windows speak of positions in the whole sequence; a kernel's window counts rows and keys of its call.
Between two blocks of the same stride they differ by an offset, which cutting off rows or keys removes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .sharding import Block, Layout, blocks_of


@dataclass(frozen=True)
class Tile:
    """One call: row i of [row_begin, row_end) attends keys i − window_left to i + window_right of [key_begin, key_end).

    None is no bound. Rows and keys are counted within their shards, i from row_begin, keys from key_begin.
    """

    row_begin: int
    row_end: int
    key_begin: int
    key_end: int
    window_left: int | None = None
    window_right: int | None = None

    @property
    def is_full(self) -> bool:
        return self.window_left is None and self.window_right is None


def tiles_between(
    layout: Layout,
    rows: int,
    keys: int,
    query_rank: int,
    key_rank: int,
    world_size: int,
    window_left: int | None,
    window_right: int | None,
) -> list[Tile]:
    """The calls for a shard of ``rows`` query rows and one of ``keys`` keys; a causal mask is ``window_right = 0``."""
    if query_rank == key_rank and rows == keys and window_left is None and window_right == 0:
        return [Tile(0, rows, 0, keys, None, 0)]  # the shard's rows ascend, so that causal is causal within it
    found = (
        tile
        for queries in blocks_of(layout, rows, query_rank, world_size)
        for block in blocks_of(layout, keys, key_rank, world_size)
        if (tile := _tile(queries, block, window_left, window_right)) is not None
    )
    return list(_joined(found))


def _tile(queries: Block, keys: Block, window_left: int | None, window_right: int | None) -> Tile | None:
    """None where no row attends any key."""
    offset = queries.start - keys.start
    left = None if window_left is None else (window_left - offset) // queries.stride
    right = None if window_right is None else (window_right + offset) // queries.stride
    if left is not None and right is not None and left + right < 0:
        return None
    first_row = first_key = 0
    if right is not None and right < 0:  # the first rows come before all keys
        first_row, right, left = -right, 0, None if left is None else left + right
    if left is not None and left < 0:  # the first keys have left the first row's window
        first_key, left, right = -left, 0, None if right is None else right + left
    row_count, key_count = queries.size - first_row, keys.size - first_key
    if row_count <= 0 or key_count <= 0:
        return None
    # Rows behind the last key's reach, and keys behind the last row's.
    row_count, key_count = (
        row_count if left is None else min(row_count, key_count + left),
        key_count if right is None else min(key_count, row_count + right),
    )
    row, key = queries.begin + first_row, keys.begin + first_key
    return Tile(
        row,
        row + row_count,
        key,
        key + key_count,
        None if left is None or left >= row_count - 1 else left,
        None if right is None or right >= key_count - 1 else right,
    )


def _joined(tiles: Iterator[Tile]) -> Iterator[Tile]:
    """Neighbours without a window, of the same rows or the same keys, as one."""
    last: Tile | None = None
    for tile in tiles:
        if last is None:
            last = tile
            continue
        both_full = last.is_full and tile.is_full
        same_rows = (last.row_begin, last.row_end) == (tile.row_begin, tile.row_end)
        same_keys = (last.key_begin, last.key_end) == (tile.key_begin, tile.key_end)
        if both_full and same_rows and last.key_end == tile.key_begin:
            last = replace(last, key_end=tile.key_end)
        elif both_full and same_keys and last.row_end == tile.row_begin:
            last = replace(last, row_end=tile.row_end)
        else:
            yield last
            last = tile
    if last is not None:
        yield last
