"""Packed sequences and paged caches on the emulated device: test_packed.py's calls, as emulation.Run takes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..oracle import Call
from ..varlen_cases import PackedCall, PagedCall
from .emulation import Device, Run


def rows_first(x: Tensor | None) -> Tensor | None:
    """Packed rows (T, H, D) as (1, H, T, D)."""
    return None if x is None else x.transpose(0, 1).unsqueeze(0)


class PackedRun(Run):
    """A call of packed sequences."""

    def __init__(self, device: Device, call: PackedCall, rng_state: tuple[int, int], **flags: bool) -> None:
        self.packed = call
        tensors = [rows_first(x) for x in (call.query, call.key, call.value)]
        grad_logsumexp = None if call.grad_logsumexp is None else call.grad_logsumexp.unsqueeze(0)
        four = Call(*tensors, call.options, rows_first(call.grad_out), grad_logsumexp)
        super().__init__(device, four, rng_state, **flags)

    def place_rows(self) -> None:
        p, device = self.problem, self.device
        starts_q, starts_k, p.query_length, p.key_length = self.packed.case.starts(torch.int64)
        p.batch, p.packed_rows = self.packed.case.batch, self.packed.query.size(0)
        p.query_starts, p.key_starts = device.put(starts_q), device.put(starts_k)

    # The rows after the last sequence are filled by the ops layer.

    def forward(self) -> dict[str, Tensor]:
        super().forward()
        tail = self.packed.case.tail
        if tail > 0:
            assert self.out[:, :, -tail:].isnan().all() and self.logsumexp[..., -tail:].isnan().all()
            self.out[:, :, -tail:] = 0
            self.logsumexp[..., -tail:] = -math.inf
        return {"out": self.out.squeeze(0).transpose(0, 1), "logsumexp": self.logsumexp.squeeze(0)}

    def backward(self, wanted: Any = None) -> dict[str, Tensor]:
        results = super().backward(wanted)
        for name in ("grad_query", "grad_key", "grad_value"):
            if self.packed.case.tail > 0:
                results[name][:, :, -self.packed.case.tail :] = 0
            results[name] = results[name].squeeze(0).transpose(0, 1)
        return results

    def keep_mask(self) -> Tensor:
        self.sizes = (self.packed.case.batch, self.sizes[1], self.problem.query_length)
        return super().keep_mask()


class PagedRun(Run):
    """A call of a paged cache; forward only."""

    def __init__(self, device: Device, call: PagedCall) -> None:
        self.paged = call
        caches = [x.transpose(1, 2) for x in (call.key, call.value)]
        options = {"causal_alignment": "bottom_right"} | call.options | {"key_lengths": call.key_lengths.long()}
        super().__init__(device, Call(call.query, *caches, options, None, None), (0, 0))

    def place_rows(self) -> None:
        p, table = self.problem, self.paged.block_table
        p.key_length = table.size(1) * self.paged.key.size(1)
        for x in (p.key, p.value):
            x.pages, x.pages_stride, x.page_rows = self.device.put(table), table.size(1), self.paged.key.size(1)
