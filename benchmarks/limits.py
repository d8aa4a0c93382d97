"""What grows with length and threads: the memory that a pass needs beside its tensors, and one head on two threads.

    python -m benchmarks.limits --name limits

Memory is what a process's peak grows by during one forward and backward pass, in a process of its own that has its
inputs and has run a short call before; "in tensors" is the size of out, logsumexp and the gradients, which it includes.
Scaling is wall time, one thread's by two threads', the two in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import torch_attn

from . import report
from .measure import interleave

DIM = 64


@dataclass(frozen=True)
class Memory:
    length: int
    dtype: str
    peak_mib: float
    tensors_mib: float

    def __str__(self) -> str:
        peak = f"{self.peak_mib:.1f} MiB, {self.tensors_mib:.1f} in tensors"
        return f"memory B1 H1 L{self.length} D{DIM} {self.dtype}: {peak}"


@dataclass(frozen=True)
class Scaling:
    length: int
    dtype: str
    mode: str
    two_threads: float
    low: float
    high: float

    def __str__(self) -> str:
        speed = f"{self.two_threads:.2f}x ({self.low:.2f} to {self.high:.2f})"
        return f"two threads B1 H1 L{self.length} D{DIM} {self.dtype} {self.mode}: {speed}"


def step(length: int, dtype: torch.dtype, backward: bool = True) -> Callable[[], object]:
    leaves = [torch.randn(1, 1, length, DIM, dtype=dtype, requires_grad=backward) for _ in range(3)]
    grad = torch.ones(1, 1, length, DIM, dtype=dtype)
    if not backward:
        return lambda: torch_attn.attention(*leaves)
    return lambda: torch.autograd.grad(torch_attn.attention(*leaves), leaves, grad)


def print_peak(length: str, dtype: str) -> None:
    torch.set_num_threads(1)
    step(512, getattr(torch, dtype))()
    call = step(int(length), getattr(torch, dtype))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory(length: int, dtype: str) -> Memory:
    arguments = [sys.executable, "-m", "benchmarks.limits", "--peak-of", str(length), dtype]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    tensors = length * (4 * DIM * getattr(torch, dtype).itemsize + 4) / 2**20
    return Memory(length, dtype, float(done.stdout), tensors)


def scaling(length: int, dtype: str, mode: str, seconds: float) -> Scaling:
    torch.set_num_threads(2)  # so that interleave takes wall time
    call = step(length, getattr(torch, dtype), mode != "forward")

    def on(threads: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(threads)
            call()

        return run

    timing = interleave([on(2), on(1)], seconds)
    return Scaling(length, dtype, mode, *timing.speedup())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each scaling")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(*args.peak_of)
    rows: list[Memory | Scaling] = []

    def add(row: Memory | Scaling) -> None:
        rows.append(row)
        print(row, flush=True)

    for dtype in args.dtype:
        for length in (8192, 32768):
            add(memory(length, dtype))
        for mode in ("forward", "forward+backward"):
            add(scaling(16384, dtype, mode, args.seconds))
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.limits " + " ".join(sys.argv[1:])}
        document = {"machine": machine, "results": [asdict(r) for r in rows]}
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
