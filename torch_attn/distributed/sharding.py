"""Which rows of a sequence a rank holds, and how to deal a sequence out and put it together again.

A shard is a few blocks of evenly spaced rows, in ascending order; tiles.py works out what each pair of blocks attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh | None

Layout = Literal["contiguous", "zigzag", "striped"]


@dataclass(frozen=True)
class Block:
    """Rows [begin, begin + size) of a shard; row begin + i sits at position start + i · stride of the sequence."""

    begin: int
    size: int
    start: int
    stride: int = 1

    def rows_before(self, length: Tensor) -> Tensor:
        """How many of the rows have positions below ``length``: as many first ones."""
        return ((length - self.start + self.stride - 1) // self.stride).clamp(0, self.size)


def check_layout(layout: str, function: str) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f'{function}: layout must be "contiguous", "zigzag" or "striped", but it is {layout!r}.')


def multiple_of(layout: Layout, world_size: int) -> int:
    """What a sequence's length must be a multiple of."""
    return 2 * world_size if layout == "zigzag" else world_size


def blocks_of(layout: Layout, rows: int, rank: int, world_size: int) -> list[Block]:
    """The blocks of a rank's shard of ``rows`` rows, which is even for "zigzag"."""
    if layout == "contiguous":
        return [Block(0, rows, rank * rows)]
    if layout == "striped":
        return [Block(0, rows, rank, world_size)]
    half = rows // 2
    return [Block(0, half, rank * half), Block(half, half, (2 * world_size - 1 - rank) * half)]


def rank_and_size(group: Group) -> tuple[ProcessGroup | None, int, int]:
    """The process group (None: the default one), this process's rank in it, and its size."""
    if not dist.is_available():
        raise RuntimeError("torch_attn.distributed: this build of PyTorch has no torch.distributed.")
    from torch.distributed.device_mesh import DeviceMesh

    process_group = group.get_group() if isinstance(group, DeviceMesh) else group
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("torch_attn.distributed: group must be one that this process belongs to.")
    return process_group, rank, dist.get_world_size(process_group)


def positions_of(layout: Layout, rows: int, rank: int, world_size: int, device: torch.device | None = None) -> Tensor:
    blocks = blocks_of(layout, rows, rank, world_size)
    return torch.cat([block.start + block.stride * torch.arange(block.size, device=device) for block in blocks])


def shard_positions(
    rows: int, *, group: Group = None, layout: Layout = "zigzag", device: torch.device | str | None = None
) -> Tensor:
    """The positions in the whole sequence of this rank's rows: for position embeddings, rotary ones among them.

    Args:
        rows: how many rows a rank holds, L / world size; even for "zigzag".
        group: process group or one-dimensional device mesh that shares the sequence; None: the default group.
        layout: see :func:`shard_sequence`.
        device: of the result.

    Returns:
        (rows,), int64, ascending.
    """
    check_layout(layout, "shard_positions")
    _, rank, size = rank_and_size(group)
    if rows < 0 or (layout == "zigzag" and rows % 2):
        kind = "even and at least 0, for the zigzag layout" if layout == "zigzag" else "at least 0"
        raise ValueError(f"shard_positions: rows must be {kind}, but it is {rows}.")
    return positions_of(layout, rows, rank, size, torch.device(device) if device is not None else None)


def shard_sequence(
    sequence: Tensor, *, dim: int = -2, group: Group = None, layout: Layout = "zigzag", pad: bool = False
) -> Tensor:
    """This rank's rows of a sequence that every rank holds: tokens, labels, hidden states, or query, key and value.

    - "contiguous": rank r of P holds the r-th of P equal parts. With a causal mask the last rank has about twice the
      mean work, and the others wait for it in every round of the ring.
    - "zigzag": of 2P equal parts, rank r holds part r and part 2P − 1 − r. With a causal mask all ranks have the same
      work in every round, in whole blocks (Llama 3's context parallelism; "head-tail" in PyTorch's).
    - "striped": rank r holds rows r, r + P, r + 2P, …. With a causal mask all ranks have nearly the same work in every
      round (Brandon et al. 2023, "Striped Attention").

    Args:
        sequence: the same on every rank.
        dim: the dimension of length L to share out: −2 for query, key and value, 1 for tokens (B, L).
        group: process group or one-dimensional device mesh that shares the sequence; None: the default group.
        layout: "contiguous", "zigzag" or "striped".
        pad: append zeros where L is not a multiple of P, 2P for "zigzag". Then pass ``key_lengths`` to
            :func:`ring_attention` (with a causal mask it is not needed, as nothing attends what comes later), and
            ``length`` to :func:`unshard_sequence`.

    Returns:
        The shard, a copy, of ceil(L / P) rows (for "zigzag" rounded up to even). Gradients flow back to this rank's
        ``sequence``; add them up over the ranks where its other rows matter.

    Raises:
        ValueError: for an L that does not divide, without ``pad``.
    """
    check_layout(layout, "shard_sequence")
    _, rank, size = rank_and_size(group)
    length = sequence.size(dim)
    multiple = multiple_of(layout, size)
    rows = -(-length // multiple) * (multiple // size)
    if rows * size != length and not pad:
        raise ValueError(
            f"shard_sequence: dimension {dim} of sequence must be a multiple of {multiple} to be shared by {size} "
            f'ranks in the layout "{layout}", but it is {length}; pad=True appends zeros.'
        )
    positions = positions_of(layout, rows, rank, size, sequence.device)
    present = positions[positions < length]  # a prefix, as positions ascend
    shard = sequence.index_select(dim, present)
    missing = rows - present.numel()
    if missing == 0:
        return shard
    sizes = list(shard.shape)
    sizes[dim] = missing
    return torch.cat([shard, shard.new_zeros(sizes)], dim)


def unshard_sequence(
    shard: Tensor, *, dim: int = -2, group: Group = None, layout: Layout = "zigzag", length: int | None = None
) -> Tensor:
    """The whole sequence on every rank, from the shards of all: the inverse of :func:`shard_sequence`.

    For looking at results and for losses that are not differentiated: the result has no gradient.

    Args:
        shard: this rank's, of the same shape on every rank.
        dim: the dimension that is shared out.
        group, layout: what :func:`shard_sequence` was given.
        length: of the sequence without padding; None: there is none.

    Returns:
        ``shard`` with dimension ``dim`` of size ``length``.
    """
    check_layout(layout, "unshard_sequence")
    process_group, _, size = rank_and_size(group)
    rows = shard.size(dim)
    if layout == "zigzag" and rows % 2:
        raise ValueError(
            f"unshard_sequence: dimension {dim} of shard must be even for the zigzag layout, but it is {rows}."
        )
    if length is not None and not 0 <= length <= rows * size:
        raise ValueError(
            f"unshard_sequence: length must be between 0 and {rows * size}, the rows of all shards, but it is {length}."
        )
    own = shard.detach().movedim(dim, 0).contiguous()
    shards = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(shards, own, group=process_group)
    sequence = own.new_empty(rows * size, *own.shape[1:])
    for rank, part in enumerate(shards):
        sequence[positions_of(layout, rows, rank, size, own.device)] = part
    return sequence[:length].movedim(0, dim).contiguous()
