"""Command line of the benchmarks: attention against PyTorch's SDPA on this machine's CPU; forward mode and double
backward against its math path, as SDPA has no other there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from tqdm import tqdm

from . import peak, report
from .cases import CASES, MODES
from .run import Result, run_case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", default="", help="only cases in whose name this regular expression is found")
    parser.add_argument("--group", nargs="+", help=f"only these groups of {sorted({c.group for c in CASES})}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["forward", "forward+backward"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each pair")
    parser.add_argument("--no-accuracy", action="store_true", help="skip the comparison with float64")
    parser.add_argument("--name", help="write results/NAME.json and results/NAME.png beside this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    cases = [c for c in CASES if re.search(args.case, c.name) and (not args.group or c.group in args.group)]
    plan = [
        (threads, dtype, case, mode)
        for threads in args.threads
        for dtype in args.dtype
        for case in cases
        for mode in args.mode
        if not (case.forward_only and mode != "forward")
    ]
    folder = Path(__file__).parent / "results"
    results: list[Result] = []
    limits: dict[int, dict[str, float]] = {}
    print(report.HEADER)
    for threads, dtype, case, mode in tqdm(plan, unit="pair", leave=False):
        torch.set_num_threads(threads)
        if threads not in limits:
            limits[threads] = {"threads": threads, "fma": peak.fma_peak(), "read": peak.read_bandwidth()}
        limit = limits[threads]
        result = run_case(case, DTYPES[dtype], mode, args.seconds, limit["fma"], limit["read"], not args.no_accuracy)
        results.append(result)
        tqdm.write(report.format_row(result))
        if args.name:  # after each pair, so that a run which is cut short leaves what it has
            report.write_json(results, list(limits.values()), folder / f"{args.name}.json")
    for limit in limits.values():
        fma, read = limit["fma"] / 1e9, limit["read"] / 1e9
        print(f"{limit['threads']} threads: FMA peak {fma:.0f} GFLOP/s, read {read:.1f} GB/s")
    for name, mean in report.geometric_means(results).items():
        print(f"geometric mean, {name}: {mean:.2f}x")
    if args.name:
        report.write_plot(results, folder / f"{args.name}.png")


if __name__ == "__main__":
    main()
