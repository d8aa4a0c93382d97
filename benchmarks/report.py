"""Prints results as a table and writes them, with the machine and the command, as JSON and as a plot."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from .cases import CASES
from .run import Result

COLUMNS = ("case", "dtype", "mode", "against", "speedup (quartiles)", "% of limit", "error ours/torch")
HEADER = "{:40} {:9} {:17} {:>9} {:>22} {:>14} {:>20}".format(*COLUMNS)


def against(r: Result) -> str:
    """What a result was compared with: threads of the CPU, or a backend of PyTorch's on a GPU."""
    return r.baseline if r.device == "cuda" else f"{r.threads} thread{'s' if r.threads > 1 else ''}"


def format_row(r: Result) -> str:
    speed = f"{r.speedup:6.2f}x ({r.speedup_low:.2f} to {r.speedup_high:.2f})"
    error = "" if r.error_ours is None or r.error_torch is None else f"{r.error_ours:.1e} / {r.error_torch:.1e}"
    if r.share_of_bandwidth is not None and r.share_of_bandwidth_torch is not None:
        share = f"{100 * r.share_of_bandwidth:.0f}/{100 * r.share_of_bandwidth_torch:.0f}% bw"
    else:
        share = f"{100 * r.share_of_peak:.0f}% peak"
    return f"{r.case:40} {r.dtype:9} {r.mode:17} {against(r):>9} {speed:>22} {share:>14} {error:>20}"


def geometric_means(results: Iterable[Result]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for r in results:
        groups[f"{r.dtype} {r.mode} {against(r)}"].append(r.speedup)
    return {name: math.exp(sum(map(math.log, s)) / len(s)) for name, s in groups.items()}


def options_of(results: Iterable[Result]) -> dict[str, Result]:
    """The results of cases with an option whose cost was measured, by what they were measured over."""
    plain = {case.name: case.plain for case in CASES}
    return {
        f"{r.case} over {plain[r.case]}, {r.dtype} {r.mode} {against(r)}": r
        for r in results
        if r.option_cost is not None
    }


def format_cost(r: Result) -> str:
    low, middle, high = (f"{100 * x:.0f}%" for x in (r.option_cost_low, r.option_cost, r.option_cost_high))
    return f"{middle} ({low} to {high})"


# What restricts the instruction sets of this library and of PyTorch's parts.
ENVIRONMENT = ("TORCH_ATTN_CPU_ISA", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def machine() -> dict[str, object]:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        return done.stdout.strip()

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), cpu)
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": cpu,
        "instruction_set": torch.ops.torch_attn.cpu_isa(),
        "torch": torch.__version__,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }


def write_json(results: list[Result], limits: list[dict[str, float | str]], path: Path) -> None:
    document = {
        "machine": machine(),
        "limits": limits,
        "geometric_means": geometric_means(results),
        "option_costs": {name: r.option_cost for name, r in options_of(results).items()},
        "results": [r.as_dict() for r in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def write_plot(results: list[Result], path: Path) -> None:
    """One bar a case and mode, one panel a dtype and number of threads or backend; the line at 1 is PyTorch's SDPA."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for r in results:
        panels[(r.dtype, against(r))].append(r)
    cases = list(dict.fromkeys(r.case for r in results))  # of all panels: their axis is the same
    height = len(cases) * 0.3 + 1.5
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels) + 2, height), squeeze=False, sharey=True)
    for axis, ((dtype, baseline), rows) in zip(axes[0], panels.items(), strict=True):
        modes = list(dict.fromkeys(r.mode for r in rows))
        for m, mode in enumerate(modes):
            chosen = [r for r in rows if r.mode == mode]
            places = [cases.index(r.case) + (m - (len(modes) - 1) / 2) * 0.38 for r in chosen]
            widths = [r.speedup - 1 for r in chosen]
            axis.barh(places, widths, left=1, height=0.36, label=mode)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(cases)), cases)
        axis.set_xlabel("times as fast as PyTorch's SDPA")
        axis.set_title(f"{dtype}, {baseline}")
        axis.legend()
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
