"""The table "what works where": its rows are the tests of this folder, its columns the options they run with.

``works`` both parametrises a test with the options and enters it into the table, so that nothing is in the table that
no test tries. ``python -m tests.what_works_where`` writes docs/what_works_where.md; test_table.py fails where the file
says anything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .layers import OPTIONS

FILE = Path(__file__).parents[2] / "docs" / "what_works_where.md"
SECTIONS = {
    "test_derivatives": "Derivatives",
    "test_programs": "Compilers and saved programs",
    "test_cpp": "In a C++ program, without Python",
    "test_training": "Training",
}
INTRODUCTION = """\
# What works where

Made from the tests in `tests/what_works_where` by `python -m tests.what_works_where`; a test
fails when this file says anything else. ✓: a test of exactly this combination, of the gradients of query, key, value,
mask, ALiBi slopes and sinks as well where the row has gradients, passes on the CPU. *fused*: in this library's kernels,
at O(L) memory. *composite*: by PyTorch's operations, which store the (L, S) scores.

On CUDA, forward and backward are fused as well, and forward mode and second derivatives composite; `tests/cuda` tries
options, derivatives, autocast, torch.compile, TorchScript and CUDA graphs on a GPU, but not this table.
"""


@dataclass
class Row:
    what: str
    note: str
    without: dict[str, str] = field(default_factory=dict)


ROWS: dict[str, list[Row]] = {section: [] for section in SECTIONS}


def works(what: str, note: str = "", without: dict[str, str] | None = None) -> Callable[[Any], Any]:
    """The decorated test, whose argument ``option`` is a name in OPTIONS, proves that ``what`` works with the option.

    ``without`` names the options it is not tried with, each with the reason, which the table repeats.
    """
    row = Row(what, note, without or {})

    def register(test: Any) -> Any:
        ROWS[test.__module__.rpartition(".")[2]].append(row)
        return pytest.mark.parametrize("option", [o for o in OPTIONS if o not in row.without])(test)

    return register


def render() -> str:
    for section in SECTIONS:
        importlib.import_module(f"{__package__}.{section}")
    reasons: list[str] = []
    lines = [INTRODUCTION]
    for section, title in SECTIONS.items():
        lines += [f"## {title}", "", f"| | {' | '.join(OPTIONS)} | |", f"| --- |{' :-: |' * len(OPTIONS)} --- |"]
        for row in ROWS[section]:
            cells = []
            for option in OPTIONS:
                reason = row.without.get(option)
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                cells.append("✓" if reason is None else f"[{reasons.index(reason) + 1}]")
            lines.append(f"| {row.what} | {' | '.join(cells)} | {row.note} |")
        lines.append("")
    lines += [f"[{i}] {reason}" for i, reason in enumerate(reasons, start=1)]
    return "\n".join(lines).rstrip() + "\n"
