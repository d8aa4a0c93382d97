"""Packed sequences against padded ones, and a paged cache against one gathered before: what leaving work out gains.

    python -m benchmarks.varlen --name varlen

Training: forward and backward of B sequences, in turn packed (varlen_attention), padded with key lengths (attention),
and padded with a mask (PyTorch's SDPA). Decoding: paged_attention, and gathering the blocks for attention.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_attn

from . import report
from .measure import interleave


@dataclass(frozen=True)
class Row:
    """milliseconds are ours; the speedups are medians of the others' time by ours, in the order of ``against``."""

    what: str
    dtype: str
    threads: int
    filled: float  # share of the padded rows, or of the table's places, that hold something
    milliseconds: float
    against: tuple[str, ...]
    speedups: tuple[float, ...]

    def __str__(self) -> str:
        others = ", ".join(f"{s:.2f}x as fast as {a}" for s, a in zip(self.speedups, self.against, strict=True))
        what = f"{self.what} {self.dtype} {self.threads} thr, {self.filled:.0%} filled"
        return f"{what:64} {self.milliseconds:8.2f} ms, {others}"


def row(what: str, dtype: torch.dtype, filled: float, calls: dict[str, Callable[[], object]], seconds: float) -> Row:
    timing = interleave(list(calls.values()), seconds)
    others = tuple(calls)[1:]
    speedups = tuple(timing.speedup(0, i + 1)[0] for i in range(len(others)))
    name = str(dtype).removeprefix("torch.")
    return Row(what, name, torch.get_num_threads(), filled, 1e3 * timing.best(0), others, speedups)


def training(lengths: list[int], heads: int, dim: int, dtype: torch.dtype, causal: bool, seconds: float) -> Row:
    batch, longest, total = len(lengths), max(lengths), sum(lengths)
    valid = torch.tensor(lengths)
    starts = F.pad(valid.cumsum(0), (1, 0)).int()
    rows = [torch.randn(total, heads, dim).to(dtype).requires_grad_() for _ in range(3)]
    padded = [torch.randn(batch, heads, longest, dim).to(dtype).requires_grad_() for _ in range(3)]
    mask = (torch.arange(longest) < valid[:, None])[:, None, None]
    if causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool).tril()

    def step(attention: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
        grad = torch.randn_like(inputs[0])
        return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch_attn.varlen_attention(q, k, v, starts, starts, longest, longest, is_causal=causal)

    calls = {
        "packed": step(packed, rows),
        "padded": step(lambda q, k, v: torch_attn.attention(q, k, v, is_causal=causal, key_lengths=valid), padded),
        "SDPA padded": step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), padded),
    }
    what = f"training B{batch} H{heads} L{longest} D{dim}{' causal' if causal else ''}"
    return row(what, dtype, total / (batch * longest), calls, seconds)


def decoding(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seconds: float) -> Row:
    block_size, batch = 16, len(lengths)
    used = torch.tensor(lengths, dtype=torch.int32)
    width = -(-max(lengths) // block_size)
    table = torch.randperm(batch * width).view(batch, width).int()
    caches = [torch.randn(batch * width, block_size, kv_heads, dim).to(dtype) for _ in range(2)]
    query = torch.randn(batch, heads, 1, dim).to(dtype)

    def gathered() -> Tensor:
        key, value = (x[table.long()].flatten(1, 2).transpose(1, 2) for x in caches)
        return torch_attn.attention(query, key, value, key_lengths=used, enable_gqa=True)

    calls = {
        "paged": lambda: torch_attn.paged_attention(query, *caches, table, used, enable_gqa=True),
        "gathering first": gathered,
    }
    what = f"decoding B{batch} H{heads}/{kv_heads} S{max(lengths)} D{dim}"
    return row(what, dtype, sum(lengths) / (batch * width * block_size), calls, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.varlen", description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in (getattr(torch, name) for name in args.dtype):
            for lengths in ([512, 64, 128, 300, 90, 40, 200, 256], [1024, 100, 100, 100]):
                for causal in (False, True):
                    rows.append(training(lengths, 8, 64, dtype, causal, args.seconds))
                    print(rows[-1], flush=True)
            rows.append(decoding([4096, 700, 1500, 90], 32, 8, 128, dtype, args.seconds))
            print(rows[-1], flush=True)
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.varlen " + " ".join(sys.argv[1:])}
        document = {"machine": machine, "results": [asdict(r) for r in rows]}
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
