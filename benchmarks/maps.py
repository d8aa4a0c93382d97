"""Attention maps against what people do without them: nn.MultiheadAttention(need_weights=True), the whole softmax.

    python -m benchmarks.maps --name attention_maps

Time is the CPU time of one thread, the contenders in turn. Memory is what a process's peak grows by during one call, in
a process of its own that has its inputs and has run a small call before (Linux only). The statistics of the longest
query have no contender: its map would not fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_attn

from . import report
from .measure import interleave

DIM = 64
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Self-attention of one sequence, or of ``batch``: our call, and the usual one if that is possible."""

    name: str
    heads: int
    length: int
    ours: Callable[[Case], Call]
    usual: Callable[[Case], Call] | None = None
    batch: int = 1

    def query_and_key(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        query, key = (torch.randn(self.batch, self.heads, self.length, DIM) for _ in range(2))
        return query, key

    def module(self, kind: type[nn.MultiheadAttention], **options: bool) -> Call:
        torch.manual_seed(0)
        width = self.heads * DIM
        attention = kind(width, self.heads, batch_first=True).eval()
        x = torch.randn(self.batch, self.length, width)
        return lambda: attention(x, x, x, **options)


def weights(**options: object) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        query, key = case.query_and_key()
        return lambda: torch_attn.attention_weights(query, key, **options)

    return make


def statistics(**options: object) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        query, key = case.query_and_key()
        return lambda: torch_attn.attention_statistics(query, key, **options)

    return make


def of_softmax(reduce: Callable[[Tensor], object]) -> Callable[[Case], Call]:
    def make(case: Case) -> Call:
        query, key = case.query_and_key()
        return lambda: reduce(torch.softmax(query @ key.mT * DIM**-0.5, -1))

    return make


def our_module(**options: bool) -> Callable[[Case], Call]:
    return lambda case: case.module(torch_attn.MultiheadAttention, **options)


def torchs_module(**options: bool) -> Callable[[Case], Call]:
    return lambda case: case.module(nn.MultiheadAttention, **options)


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


NEED, DO_NOT = {"need_weights": True}, {"need_weights": False}
CASES = [
    Case(
        "module with mean weights against nn.MultiheadAttention's", 16, 4096, our_module(**NEED), torchs_module(**NEED)
    ),
    Case("mean over heads against nn.MultiheadAttention's", 16, 4096, weights(heads="mean"), torchs_module(**NEED)),
    Case("mean over heads against softmax", 16, 2048, weights(heads="mean"), of_softmax(lambda p: p.mean(1))),
    Case("all weights against softmax", 8, 1024, weights(), of_softmax(lambda p: p)),
    Case("entropy and more against softmax", 8, 2048, statistics(column_sum=False), of_softmax(entropy)),
    Case("top 8 against softmax", 8, 2048, statistics(column_sum=False, top_k=8), of_softmax(lambda p: p.topk(8))),
    Case("all statistics against column sums of softmax", 8, 2048, statistics(), of_softmax(lambda p: p.sum(-2))),
    *(
        Case("our module with weights against without", 8, length, our_module(**NEED), our_module(**DO_NOT), batch=8)
        for length in (128, 512)
    ),
    Case("all statistics", 1, 32768, statistics()),
]


@dataclass(frozen=True)
class Row:
    case: str
    batch: int
    heads: int
    length: int
    milliseconds: float
    peak_mib: float
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    usual_peak_mib: float | None = None

    def __str__(self) -> str:
        text = f"{self.case:56} B{self.batch} H{self.heads:<2} L{self.length:<5} {self.milliseconds:8.1f} ms"
        text += f"  peak {self.peak_mib:7.1f} MiB"
        if self.speedup is None:
            return text
        speed = f"{self.speedup:.2f}x ({self.speedup_low:.2f} to {self.speedup_high:.2f})"
        return f"{text}  {speed} the usual way, which takes {self.usual_peak_mib:.0f} MiB"


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def print_peak(index: str, contender: str) -> None:
    torch.set_num_threads(1)
    case = CASES[int(index)]
    make = case.ours if contender == "ours" else case.usual
    assert make is not None
    with torch.no_grad():
        make(Case(case.name, case.heads, 64, case.ours, case.usual, case.batch))()
        call = make(case)
        Path("/proc/self/clear_refs").write_text("5")  # lets the peak start anew from what is resident now
        before = peak_kib()
        call()
    print((peak_kib() - before) / 1024)


def peak_mib(index: int, contender: str) -> float:
    arguments = [sys.executable, "-m", "benchmarks.maps", "--peak-of", str(index), contender]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return float(done.stdout)


def measure(index: int, seconds: float) -> Row:
    case = CASES[index]
    calls = [make(case) for make in (case.ours, case.usual) if make is not None]
    with torch.no_grad():
        timing = interleave(calls, seconds, min_rounds=3)
    shape = (case.name, case.batch, case.heads, case.length, 1e3 * timing.best(0), peak_mib(index, "ours"))
    if case.usual is None:
        return Row(*shape)
    return Row(*shape, *timing.speedup(), peak_mib(index, "usual"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maps", description=__doc__)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each case")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(*args.peak_of)
    torch.set_num_threads(1)
    rows = []
    for index, case in enumerate(CASES):
        if args.case not in case.name:
            continue
        rows.append(measure(index, args.seconds))
        print(rows[-1], flush=True)
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.maps " + " ".join(sys.argv[1:])}
        document = {"machine": machine, "results": [asdict(r) for r in rows]}
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
