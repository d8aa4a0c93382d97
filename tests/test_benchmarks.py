"""benchmarks: what an option costs is measured in turn with the call without it, and reported by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import report
from benchmarks.cases import CASES, Case
from benchmarks.measure import Timing
from benchmarks.run import option_cost, run_case

BY_NAME = {case.name: case for case in CASES}


def test_plain_cases_exist_and_lack_options() -> None:
    with_plain = [case for case in CASES if case.plain]
    assert {case.group for case in with_plain} == {"masks", "long"}
    for case in with_plain:
        plain = case.plain_case()
        assert plain is BY_NAME[case.plain]
        assert not plain.options and plain.draw is None and not plain.plain
    assert all(case.plain for case in CASES if case.draw or "dropout_p" in case.options)


def test_cost_is_the_median_of_the_rounds_per_touched_score() -> None:
    # The first round is of a slow moment, which slows all: the ratios stay.
    timing = Timing([[4.8, 99.0, 4.0], [1.2, 9.0, 1.0], [1.1, 9.0, 1.0], [1.3, 9.0, 1.0], [1.4, 9.0, 1.0]])
    plain = Case("plain", 1, 1, 64, 64, 16)
    whole = replace(plain, name="whole")
    assert option_cost(whole, plain, timing, 2) == pytest.approx((0.2, 0.2, 0.3))
    half = replace(plain, name="half", key_length=128)  # touches twice as many scores
    assert option_cost(half, plain, timing, 2) == pytest.approx((-0.4, -0.4, -0.35))


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_report_has_costs_of_cases_with_options_only(mode: str) -> None:
    option = replace(BY_NAME["bool mask B1 H8 L2048 D64"], query_length=64, key_length=64)
    results = [
        run_case(case, torch.float32, mode, 0.01, peak=1e9, bandwidth=1e9, with_accuracy=True)
        for case in (option, BY_NAME["B1 H8 L16 D64"])
    ]
    masked, plain = results
    assert plain.option_cost is None and plain.option_cost_low is None and plain.option_cost_high is None
    costs = report.options_of(results)
    (name,) = costs
    threads = report.against(masked)
    assert name == f"bool mask B1 H8 L2048 D64 over B1 H8 L2048 D64, float32 {mode} {threads}"
    assert costs[name] is masked
    assert -1 < masked.option_cost_low <= masked.option_cost <= masked.option_cost_high
    assert report.format_cost(masked).count("%") == 3
