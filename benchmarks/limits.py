"""What grows with length and threads: the memory that a pass needs beside its tensors, and one head on two threads.

    python -m benchmarks.limits --name limits
    python -m benchmarks.limits --only memory --name long_context   # two to four minutes of one core

Memory is what a process's resident memory (VmHWM) grows by during one forward and backward pass, in a process of its
own that has its inputs and has run a short call before; "in tensors" is the size of out, logsumexp and the gradients,
which it includes. A ring's is that of the rank that needs most, each a process of its own. Scaling is wall time, one
thread's by two threads', the two in turn.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import torch_attn
from torch_attn.distributed import ring_attention

from . import report
from .measure import interleave

DIM = 64


@dataclass(frozen=True)
class Memory:
    length: int
    dtype: str
    is_causal: bool
    ranks: int  # 1: one process, torch_attn.attention; more: a ring of processes
    inputs_mib: float  # query, key, value and the gradient of out; of one rank
    tensors_mib: float
    peak_mib: float
    score_matrix_mib: float  # one (L, L) matrix of this dtype, which is never stored
    cpu_seconds: float  # of one rank

    def __str__(self) -> str:
        kind = " causal" * self.is_causal + f" ring of {self.ranks}" * (self.ranks > 1)
        sizes = f"{self.tensors_mib:.1f} in tensors, {self.inputs_mib:.1f} of inputs"
        peak = f"{self.peak_mib:.1f} MiB, {sizes}; the scores would take {self.score_matrix_mib:.0f}"
        return f"memory B1 H1 L{self.length} D{DIM} {self.dtype}{kind}: {peak}; {self.cpu_seconds:.1f} s"


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


def step(length: int, dtype: torch.dtype, backward: bool = True, is_causal: bool = False) -> Callable[[], object]:
    leaves = [torch.randn(1, 1, length, DIM, dtype=dtype, requires_grad=backward) for _ in range(3)]
    grad = torch.ones(1, 1, length, DIM, dtype=dtype)
    attend = ring_attention if dist.is_initialized() else torch_attn.attention
    if not backward:
        return lambda: attend(*leaves, is_causal=is_causal)
    return lambda: torch.autograd.grad(attend(*leaves, is_causal=is_causal), leaves, grad)


def resident(field: str) -> float:
    """VmRSS, or VmHWM, its peak; in MiB."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def print_peak(length: str, dtype: str, is_causal: str, rank: str, ranks: str, folder: str) -> None:
    torch.set_num_threads(1)
    if int(ranks) > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(ranks))
    step(512, getattr(torch, dtype), is_causal=is_causal == "True")()
    call = step(int(length) // int(ranks), getattr(torch, dtype), is_causal=is_causal == "True")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before, started = resident("VmRSS"), time.process_time()
    results = call()
    print(resident("VmHWM") - before, time.process_time() - started)
    del results
    if int(ranks) > 1:
        dist.destroy_process_group()


def memory(length: int, dtype: str, is_causal: bool = False, ranks: int = 1) -> Memory:
    command = [sys.executable, "-m", "benchmarks.limits", "--peak-of", str(length), dtype, str(is_causal)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), folder],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
            for rank in range(ranks)
        ]
        printed = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"A process of {' '.join(command)} failed.")
    peaks, seconds = zip(*(map(float, line.split()) for line in printed), strict=True)
    row = DIM * getattr(torch, dtype).itemsize / 2**20  # of one of query, key, value, out and their gradients
    rows = length // ranks
    scores = length**2 * getattr(torch, dtype).itemsize / 2**20
    tensors = rows * (4 * row + 4 / 2**20)
    return Memory(length, dtype, is_causal, ranks, 4 * rows * row, tensors, max(peaks), scores, max(seconds))


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
    parser.add_argument("--only", choices=["memory", "scaling"])
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(*args.peak_of)
    rows: list[Memory | Scaling] = []

    def add(row: Memory | Scaling) -> None:
        rows.append(row)
        print(row, flush=True)

    for dtype in args.dtype:
        if args.only != "scaling":
            for length in (8192, 32768):
                add(memory(length, dtype))
            for ranks in (1, 4):
                add(memory(65536, dtype, is_causal=True, ranks=ranks))
        if args.only != "memory":
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
