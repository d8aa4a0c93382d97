"""ring_attention: attention of a sequence that is shared out over processes, each holding only its own rows.

Key and value travel around the ring of ranks, one rank further in each of P rounds, while the queries stay. A rank
merges what its rows attend in each round (torch_attn.merge_attention). Backward sends key and value around once more;
their gradients travel with them, one rank behind. A rank never holds more of either than its own and two shards more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..merge import merge_attention
from .sharding import Layout, blocks_of, check_layout, rank_and_size
from .tiles import Tile, tiles_between

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .sharding import Group

# Beyond this a kernel's backward divides each row's weights by their sum (kLargeLogsumexp in
# csrc/core/online_softmax.h), which is wrong for a row that has other keys elsewhere.
LARGE_LOGSUMEXP = 4096.0


@dataclass(frozen=True)
class Call:
    """What all rounds of a call share."""

    group: ProcessGroup | None
    rank: int
    size: int
    layout: Layout
    window_left: int | None
    window_right: int | None
    options: dict[str, Any]  # scale and softcap, for the operators

    def owner(self, step: int) -> int:
        """Whose key and value this rank has in a round."""
        return (self.rank - step) % self.size

    def tiles(self, query: Tensor, key: Tensor, step: int) -> list[Tile]:
        sizes = (query.size(2), key.size(2), self.rank, self.owner(step), self.size)
        return tiles_between(self.layout, *sizes, self.window_left, self.window_right)

    def tile_options(self, tile: Tile, key_length: int, key_lengths: Tensor | None, step: int) -> dict[str, Any]:
        options = {**self.options, "window_left": tile.window_left, "window_right": tile.window_right}
        if key_lengths is not None:  # of the whole sequence; the shard's rows below it come first
            blocks = blocks_of(self.layout, key_length, self.owner(step), self.size)
            present = torch.stack([block.rows_before(key_lengths) for block in blocks]).sum(0)
            options["key_lengths"] = (present - tile.key_begin).clamp(0, tile.key_end - tile.key_begin)
        return options

    def exchange(self, tensors: Sequence[Tensor], tag: int = 0) -> Exchange:
        """Start to send tensors, unchanged until the end, to the next rank, and to get the like from the previous."""
        if self.size == 1:
            return Exchange([], [], list(tensors))
        received = [torch.empty_like(tensor) for tensor in tensors]
        successor, predecessor = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = []
        for i, (tensor, place) in enumerate(zip(tensors, received, strict=True), start=tag):
            operations.append(dist.P2POp(dist.isend, tensor, group=self.group, tag=i, group_peer=successor))
            operations.append(dist.P2POp(dist.irecv, place, group=self.group, tag=i, group_peer=predecessor))
        return Exchange(dist.batch_isend_irecv(operations) if operations else [], list(tensors), received)

    def rotate(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(round, key, value) of every rank in turn, this rank's first; the next ones travel while these are used."""
        for step in range(self.size):
            following = self.exchange([key, value]) if step + 1 < self.size else None
            yield step, key, value
            if following is not None:
                key, value = following.wait()


@dataclass
class Exchange:
    """Tensors on their way."""

    works: list[dist.Work]
    sent: list[Tensor]  # kept alive until they have left
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.sent = []
        return self.received


class RingAttention(torch.autograd.Function):
    """(output, logsumexp) of four-dimensional query, key and value."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        key, value = key.contiguous(), value.contiguous()
        batch, heads, rows, _ = query.shape
        accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
        # Laid out as the operators lay out theirs, (batch, row, head, column).
        out = query.new_zeros(batch, rows, heads, value.size(-1), dtype=accumulator).transpose(1, 2)
        logsumexp = query.new_full((batch, heads, rows), -torch.inf, dtype=accumulator)
        for step, keys, values in call.rotate(key, value):
            for tile in call.tiles(query, keys, step):
                here = slice(tile.row_begin, tile.row_end)
                there = slice(tile.key_begin, tile.key_end)
                part, part_logsumexp, _ = torch.ops.torch_attn.attention_forward(
                    query[:, :, here],
                    keys[:, :, there],
                    values[:, :, there],
                    **call.tile_options(tile, keys.size(2), key_lengths, step),
                )
                out[:, :, here], logsumexp[:, :, here] = merge_attention(
                    [out[:, :, here], part], [logsumexp[:, :, here], part_logsumexp]
                )
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, key_lengths, out, logsumexp)
        ctx.set_materialize_grads(False)
        ctx.call = call
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = RingAttention.gradients(ctx, *grads)
        if torch.is_grad_enabled():
            causes = [x for x in (*ctx.saved_tensors[:3], *grads) if x is not None]
            results = tuple(None if x is None else OnceDifferentiable.apply(x, *causes) for x in results)
        return (*results, None, None)

    @staticmethod
    def gradients(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, key_lengths, out, logsumexp = ctx.saved_tensors
        call: Call = ctx.call
        wanted = ctx.needs_input_grad[:3]
        if grad_out is None:  # on all ranks the ring turns, whether or not this one's rows have a gradient
            grad_out = torch.zeros_like(out)
        rng_state = torch.zeros(3, dtype=torch.int64, device=query.device)  # of no dropout
        lowered = _lowered(logsumexp)

        def chosen(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
            """Of (key's, value's), those that have a gradient."""
            return [x for x, is_wanted in zip(pair, wanted[1:], strict=True) if is_wanted]

        grad_query = torch.zeros_like(query, dtype=logsumexp.dtype)
        travelling: Exchange | None = None
        for step, keys, values in call.rotate(key, value):
            parts = []  # of this round's key and value, while what earlier ranks added up for them is on its way
            for tile in call.tiles(query, keys, step):
                here = slice(tile.row_begin, tile.row_end)
                there = slice(tile.key_begin, tile.key_end)
                options = call.tile_options(tile, keys.size(2), key_lengths, step)
                row_logsumexp = logsumexp[:, :, here]
                if lowered is not None:
                    options["attn_mask"] = lowered[:, :, here, None]
                    row_logsumexp = row_logsumexp + lowered[:, :, here]
                of_query, of_key, of_value, *_ = torch.ops.torch_attn.attention_backward(
                    grad_out[:, :, here],
                    None if grad_logsumexp is None else grad_logsumexp[:, :, here],
                    query[:, :, here],
                    keys[:, :, there],
                    values[:, :, there],
                    out[:, :, here],
                    row_logsumexp,
                    rng_state,
                    **options,
                    output_mask=[*wanted, False, False, False],
                )
                if wanted[0]:
                    grad_query[:, :, here] += of_query
                parts.append((there, chosen((of_key, of_value))))
            if travelling is None:
                grads = [torch.zeros_like(x, dtype=logsumexp.dtype) for x in chosen((keys, values))]
            else:
                grads = travelling.wait()
            for there, part in parts:
                for grad, of_tile in zip(grads, part, strict=True):
                    grad[:, :, there] += of_tile
            travelling = call.exchange(grads, tag=2)  # key and value travel at the same time
        assert travelling is not None
        arrived = iter(travelling.wait())  # after P rounds, back where key and value came from
        return (
            grad_query.to(query.dtype) if wanted[0] else None,
            next(arrived).to(key.dtype) if wanted[1] else None,
            next(arrived).to(value.dtype) if wanted[2] else None,
        )


class OnceDifferentiable(torch.autograd.Function):
    """A gradient, which depends on ``causes``, but has no derivative: an error for whoever asks for it.

    torch.autograd.function.once_differentiable would only see that it depends on gradients.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *causes: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("ring_attention can be differentiated once only: it has no second derivatives.")


def _lowered(logsumexp: Tensor) -> Tensor | None:
    """What to add to each row's scores and logsumexp to make the latter small, where one is large; else None."""
    large = (logsumexp.abs() > LARGE_LOGSUMEXP) & logsumexp.isfinite()
    return torch.where(large, -logsumexp, 0.0) if bool(large.any()) else None


@torch._disable_dynamo  # torch.compiler.disable would load the compiler whenever this library is imported
def _apply(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    return RingAttention.apply(query, key, value, key_lengths, call)


@overload
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    layout: Layout = "zigzag",
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...


@overload
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    layout: Layout = "zigzag",
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: Group = None,
    layout: Layout = "zigzag",
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
    enable_gqa: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`torch_attn.attention` of a sequence of which each rank of a group holds a shard, forward and backward.

    Every rank of ``group`` calls it with its own rows, as :func:`shard_sequence` deals them out, and gets the output of
    its own rows. Key and value go around the ring of ranks; in each of the P rounds the next ones travel while the ones
    at hand are used. Beside its inputs and results a rank needs the memory of two more shards of key and value, and in
    backward of three shards of their gradients in float32 (float64 for float64): O(L / P). Nothing is gathered.

    Ranks must agree on all options, on the shapes of their shards and on which of query, key and value have gradients.
    With a causal mask choose the layout "zigzag" or "striped", which give all ranks the same work.

    Args:
        query: (B, Hq, L / P, D), this rank's rows of (B, Hq, L, D); float64, float32, bfloat16 or float16.
        key: (B, Hkv, S / P, D), of query's dtype and device.
        value: (B, Hkv, S / P, Dv).
        group: process group or one-dimensional device mesh that shares the sequence; None: the default group.
        layout: which rows are a rank's, see :func:`shard_sequence`.
        is_causal: the row at position p of the whole sequence attends the keys at positions 0 to p.
        scale: factor of query · key; ``1 / sqrt(D)`` when None.
        window_left, window_right: attend the keys at positions p − window_left to p + window_right; None: no bound.
        softcap: scores become softcap · tanh(score / softcap); 0: off.
        key_lengths: (B), int32 or int64, the same on every rank: keys at positions from key_lengths[b] on, in the
            whole sequence, are not attended.
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_logsumexp: return logsumexp too.

    Returns:
        The output (B, Hq, L / P, Dv) of this rank's rows, in query's dtype; a row with no key to attend is 0. With
        ``return_logsumexp`` also logsumexp (B, Hq, L / P), float32 (float64 for float64), differentiable. Both are
        differentiable once.

    Raises:
        ValueError: for shards of an odd number of rows in the layout "zigzag", and other options out of range.

    Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"; for balance,
    Brandon et al. 2023, "Striped Attention"; the merge is :func:`torch_attn.merge_attention`'s.
    """
    process_group, rank, size = rank_and_size(group)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    _check(query, key, value, key_lengths, layout, window_left, window_right, softcap, enable_gqa)
    if is_causal:
        window_right = 0
    options = {"scale": scale, "softcap": softcap}
    call = Call(process_group, rank, size, layout, window_left, window_right, options)
    out, logsumexp = _apply(query, key, value, key_lengths, call)
    return (out, logsumexp) if return_logsumexp else out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    layout: Layout,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    enable_gqa: bool,
) -> None:
    """What the operators cannot check, or would check in some rounds and on some ranks only, while others wait."""
    check_layout(layout, "ring_attention")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(
                f"ring_attention: {name} must have 4 dimensions, (batch, heads, length, head_dim), but its shape is "
                f"{tuple(x.shape)}."
            )
        if layout == "zigzag" and x.size(2) % 2:
            raise ValueError(
                f"ring_attention: {name} must have an even number of rows on each rank in the layout "
                f'"zigzag", but its shape is {tuple(x.shape)}.'
            )
    if query.size(1) != key.size(1) and not enable_gqa:
        raise ValueError(
            "ring_attention: query and key must have the same number of heads unless enable_gqa is True, but they have "
            f"{query.size(1)} and {key.size(1)}."
        )
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        if window is not None and window < 0:
            raise ValueError(
                f"ring_attention: {name} must be None (no bound) or an integer of at least 0, but it is {window}."
            )
    # Shapes, dtypes and the other options: the operator itself does.
    meta = [x.detach().to("meta") for x in (query, key, value)]
    lengths = None if key_lengths is None else key_lengths.to("meta")
    torch.ops.torch_attn.attention_forward(*meta, key_lengths=lengths, softcap=softcap)
