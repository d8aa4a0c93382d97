"""Hard attention against what people write without it: choosing from materialised scores, forward and backward.

    python -m benchmarks.hard --name hard_attention

Time is the CPU time of one thread, the contenders in turn. Memory is what a process's peak grows by during one forward
and backward pass, in a process of its own that has its inputs and has run a small call before (Linux only).
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
import torch.nn.functional as F
from torch import Tensor

import torch_attn

from . import report
from .measure import interleave

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
DIM, COUNT = 64, 8


def scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT * DIM**-0.5


def our_straight_through(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_attn.hard_attention(query, key, value, estimator="straight_through").output.sum()


def gumbel_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (F.gumbel_softmax(scores(query, key), hard=True) @ value).sum()


def our_reinforce(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result = torch_attn.hard_attention(query, key, value)
    return result.output.sum() + result.log_prob.sum() + 0.01 * result.entropy.sum()


def categorical(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    policy = torch.distributions.Categorical(logits=scores(query, key), validate_args=False)
    choice = policy.sample()
    output = value.gather(2, choice.unsqueeze(-1).expand_as(query))
    return output.sum() + policy.log_prob(choice).sum() + 0.01 * policy.entropy().sum()


def our_top_k(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_attn.hard_attention(query, key, value, estimator="top_k", k=COUNT).output.sum()


def topk_of_scores(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    best, indices = scores(query, key).topk(COUNT)
    chosen = value.gather(2, indices.flatten(2).unsqueeze(-1).expand(-1, -1, -1, DIM)).unflatten(2, indices.shape[2:])
    return (best.softmax(-1).unsqueeze(-2) @ chosen).sum()


PAIRS: dict[str, tuple[Loss, Loss]] = {
    "straight_through against F.gumbel_softmax(hard=True)": (our_straight_through, gumbel_softmax),
    "reinforce against Categorical": (our_reinforce, categorical),
    f"top_k of {COUNT} against torch.topk": (our_top_k, topk_of_scores),
}


@dataclass(frozen=True)
class Row:
    pair: str
    heads: int
    length: int
    speedup: float
    speedup_low: float
    speedup_high: float
    milliseconds: float
    peak_mib: float
    peak_mib_materialised: float

    def __str__(self) -> str:
        speed = f"{self.speedup:.1f}x ({self.speedup_low:.1f} to {self.speedup_high:.1f}), {self.milliseconds:.0f} ms"
        memory = f"{self.peak_mib:.1f} MiB for {self.peak_mib_materialised:.0f}"
        return f"{self.pair:54} H{self.heads} L{self.length:<5} {speed:34} peak {memory}"


def inputs(heads: int, length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, DIM, requires_grad=True) for _ in range(3)]


def call_of(loss: Loss, heads: int, length: int) -> Callable[[], object]:
    leaves = inputs(heads, length)
    return lambda: torch.autograd.grad(loss(*leaves), leaves, allow_unused=True)


def peak_mib(pair: str, contender: int, heads: int, length: int) -> float:
    arguments = [sys.executable, "-m", "benchmarks.hard", "--peak-of", pair, str(contender), str(heads), str(length)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return float(done.stdout)


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def print_peak(pair: str, contender: str, heads: str, length: str) -> None:
    torch.set_num_threads(1)
    loss = PAIRS[pair][int(contender)]
    call_of(loss, int(heads), 64)()
    call = call_of(loss, int(heads), int(length))
    Path("/proc/self/clear_refs").write_text("5")  # lets the peak start anew from what is resident now
    before = peak_kib()
    call()
    print((peak_kib() - before) / 1024)


def measure(pair: str, heads: int, length: int, seconds: float) -> Row:
    timing = interleave([call_of(loss, heads, length) for loss in PAIRS[pair]], seconds, min_rounds=3)
    peaks = [peak_mib(pair, i, heads, length) for i in range(2)]
    return Row(pair, heads, length, *timing.speedup(), 1e3 * timing.best(0), *peaks)


def write(rows: list[Row], name: str) -> None:
    machine = report.machine() | {"command": "python -m benchmarks.hard " + " ".join(sys.argv[1:])}
    document = {"machine": machine, "results": [asdict(r) for r in rows]}
    (Path(__file__).parent / "results" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard", description=__doc__)
    parser.add_argument("--length", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each pair")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    parser.add_argument("--peak-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(*args.peak_of)
    torch.set_num_threads(1)
    rows = []
    for pair in PAIRS:
        for length in args.length:
            rows.append(measure(pair, 1 if length > 4096 else 4, length, args.seconds))
            print(rows[-1], flush=True)
            if args.name:
                write(rows, args.name)
    return None


if __name__ == "__main__":
    main()
