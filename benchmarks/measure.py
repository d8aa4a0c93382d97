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


def interleave(contenders: Sequence[Callable[[], object]], seconds: float, min_rounds: int = 5) -> Timing:
    """Time the contenders in turn for about ``seconds``.

    With one torch thread the clock is that thread's CPU time, which a busy neighbour hardly disturbs; with several it
    is wall time. Calls shorter than a millisecond are repeated within a round.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = []
    for call in contenders:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, int(1e-3 / max(time.perf_counter() - start, 1e-7))))
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < min_rounds or time.perf_counter() < end:
        spent = []
        for call, repeat in zip(contenders, repeats, strict=True):
            start = clock()
            for _ in range(repeat):
                call()
            spent.append((clock() - start) / repeat)
        rounds.append(spent)
    return Timing(rounds)
