"""MultiheadAttention against nn.MultiheadAttention, forward and in a training step, with and without weights.

    python -m benchmarks.module --name module

The six contenders, and the filling of maps with a constant, run in turn, so that all ratios, to nn.MultiheadAttention
and of need_weights=True to False, come from the same rounds.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import nn

import torch_attn

from . import report
from .measure import interleave


@dataclass(frozen=True)
class Row:
    """Speedups are medians of nn.MultiheadAttention's time by ours; weights_cost is ours with weights by without: with
    their mean over the heads, and with all of them. fill_cost is what remains of that
    where weights cost nothing to compute: ours without, and filling new memory of the map's size with a constant."""

    embed: int
    heads: int
    batch: int
    length: int
    dtype: str
    threads: int
    mode: str
    milliseconds: float
    speedup: float
    speedup_with_weights: float
    weights_cost: float
    all_weights_cost: float
    fill_cost: float
    fill_all_cost: float
    torchs_weights_cost: float
    torchs_all_weights_cost: float

    def __str__(self) -> str:
        shape = f"embed {self.embed} H{self.heads} B{self.batch} L{self.length} {self.dtype} {self.threads} thr"
        costs = f"mean {self.weights_cost:.2f}x, all {self.all_weights_cost:.2f}x"
        fills = f"(filled {self.fill_cost:.2f}x, {self.fill_all_cost:.2f}x)"
        torchs = f"(torch's {self.torchs_weights_cost:.2f}x, {self.torchs_all_weights_cost:.2f}x)"
        speed = f"{self.speedup:.2f}x, with weights {self.speedup_with_weights:.2f}x"
        return f"{shape:44} {self.mode:7} {self.milliseconds:8.1f} ms {speed:29} weights cost: {costs} {fills} {torchs}"


WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})  # none, their mean, all


def forward(module: nn.Module, x: torch.Tensor, options: dict[str, bool]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return module(x, x, x, **options)

    return call


def training_step(module: nn.Module, x: torch.Tensor, options: dict[str, bool]) -> Callable[[], object]:
    leaves = [x, *module.parameters()]
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(module(x, x, x, **options)[0], leaves, grad)


def fill(elements: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).fill_(1)

    return call


MODES = {"forward": forward, "step": training_step}


def measure(embed: int, heads: int, batch: int, length: int, dtype: torch.dtype, mode: str, seconds: float) -> Row:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(embed, heads, batch_first=True, dtype=dtype)
    ours = torch_attn.MultiheadAttention(embed, heads, batch_first=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, length, embed).to(dtype).requires_grad_()
    calls = [MODES[mode](m, x, options) for m in (ours, theirs) for options in WEIGHTS]
    fills = [fill(batch * maps * length * length, dtype) for maps in (1, heads)]
    timing = interleave([*calls, *fills], seconds)
    plain, mean, everything, torchs_plain, torchs_mean, torchs_everything, fill_mean, fill_everything = range(8)
    return Row(
        embed,
        heads,
        batch,
        length,
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
        mode,
        1e3 * timing.best(plain),
        timing.speedup(plain, torchs_plain)[0],
        timing.speedup(mean, torchs_mean)[0],
        timing.speedup(plain, mean)[0],
        timing.speedup(plain, everything)[0],
        1 + timing.speedup(plain, fill_mean)[0],
        1 + timing.speedup(plain, fill_everything)[0],
        timing.speedup(torchs_plain, torchs_mean)[0],
        timing.speedup(torchs_plain, torchs_everything)[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.module", description=__doc__)
    parser.add_argument("--length", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            for embed, heads in ((512, 8), (768, 12)):
                for length, mode in product(args.length, args.mode):
                    rows.append(measure(embed, heads, args.batch, length, getattr(torch, dtype), mode, args.seconds))
                    print(rows[-1], flush=True)
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.module " + " ".join(sys.argv[1:])}
        document = {"machine": machine, "results": [asdict(r) for r in rows]}
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
