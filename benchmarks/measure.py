"""Interleaved timing: each round runs every contender once, so that a drifting machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, per contender."""

    rounds: list[list[float]]

    def best(self, contender: int) -> float:
        return min(r[contender] for r in self.rounds)

    def ratios(self, contender: int, baseline: int) -> list[float]:
        return [r[baseline] / r[contender] for r in self.rounds]

    def speedup(self, contender: int = 0, baseline: int = 1) -> tuple[float, float, float]:
        """Median of the rounds' ratios baseline / contender, with the quartiles as spread."""
        ratios = sorted(self.ratios(contender, baseline))
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def seconds_on_cpu(call: Callable[[], object], repeat: int) -> float:
    """With one torch thread the thread's CPU time, which a busy neighbour hardly disturbs; with several wall time."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def seconds_on_gpu(call: Callable[[], object], repeat: int) -> float:
    """Between two events on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeat


def interleave(
    contenders: Sequence[Callable[[], object]], seconds: float, device: str = "cpu", min_rounds: int = 5
) -> Timing:
    """Time the contenders in turn for about ``seconds``. Calls shorter than a millisecond (on a GPU: ten, so that the
    launches of one call pass during another) are repeated within a round."""
    measure, least = (seconds_on_gpu, 1e-2) if device == "cuda" else (seconds_on_cpu, 1e-3)
    repeats = []
    for call in contenders:
        call()
        repeats.append(max(1, int(least / max(measure(call, 1), 1e-7))))
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < min_rounds or time.perf_counter() < end:
        rounds.append([measure(call, repeat) for call, repeat in zip(contenders, repeats, strict=True)])
    return Timing(rounds)
