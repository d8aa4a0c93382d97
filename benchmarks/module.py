"""MultiheadAttention against nn.MultiheadAttention: a training step (forward and backward) with and without weights.

    python -m benchmarks.module --name module

The four contenders run in turn, so that both ratios, to nn.MultiheadAttention and of need_weights=True to False, come
from the same rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import torch_attn

from . import report
from .measure import interleave


@dataclass(frozen=True)
class Row:
    """Speedups are medians of nn.MultiheadAttention's time by ours; weights_cost is ours with weights by without."""

    embed: int
    heads: int
    batch: int
    length: int
    dtype: str
    threads: int
    milliseconds: float
    speedup: float
    speedup_with_weights: float
    weights_cost: float
    torchs_weights_cost: float

    def __str__(self) -> str:
        shape = f"embed {self.embed} H{self.heads} B{self.batch} L{self.length} {self.dtype} {self.threads} thr"
        costs = f"weights cost {self.weights_cost:.2f}x (torch's {self.torchs_weights_cost:.2f}x)"
        speed = f"{self.speedup:.2f}x, with weights {self.speedup_with_weights:.2f}x"
        return f"{shape:44} {self.milliseconds:8.1f} ms {speed:30} {costs}"


def training_step(module: nn.Module, x: torch.Tensor, need_weights: bool) -> Callable[[], object]:
    leaves = [x, *module.parameters()]
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(module(x, x, x, need_weights=need_weights)[0], leaves, grad)


def measure(embed: int, heads: int, batch: int, length: int, dtype: torch.dtype, seconds: float) -> Row:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(embed, heads, batch_first=True, dtype=dtype)
    ours = torch_attn.MultiheadAttention(embed, heads, batch_first=True, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(batch, length, embed).to(dtype).requires_grad_()
    timing = interleave([training_step(m, x, w) for w in (False, True) for m in (ours, theirs)], seconds)
    return Row(
        embed,
        heads,
        batch,
        length,
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
        1e3 * timing.best(0),
        timing.speedup(0, 1)[0],
        timing.speedup(2, 3)[0],
        timing.speedup(0, 2)[0],
        timing.speedup(1, 3)[0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.module", description=__doc__)
    parser.add_argument("--length", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            for embed, heads in ((512, 8), (768, 12)):
                for length in args.length:
                    rows.append(measure(embed, heads, args.batch, length, getattr(torch, dtype), args.seconds))
                    print(rows[-1], flush=True)
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.module " + " ".join(sys.argv[1:])}
        document = {"machine": machine, "results": [asdict(r) for r in rows]}
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
