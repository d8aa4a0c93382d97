"""Command line of the benchmarks: attention against PyTorch's SDPA, on this machine's CPU or GPU; forward mode and
double backward against its math path, as SDPA has no other there."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from tqdm import tqdm

from . import peak, report
from .cases import CASES, MODES
from .run import BACKENDS, BackendRefuses, Result, run_case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", default="", help="only cases in whose name this regular expression is found")
    parser.add_argument("--group", nargs="+", help=f"only these groups of {sorted({c.group for c in CASES})}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16", "float16"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["forward", "forward+backward"])
    parser.add_argument("--threads", nargs="+", type=int, help="of the CPU; default 1 and 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sdpa", nargs="+", choices=BACKENDS, default=["auto"], help="PyTorch's backends")
    parser.add_argument("--tf32", action="store_true", help="let float32 products on a GPU be of TF32")
    parser.add_argument("--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each pair")
    parser.add_argument("--no-accuracy", action="store_true", help="skip the comparison with float64")
    parser.add_argument("--name", help="write results/NAME.json and results/NAME.png beside this file")
    return parser.parse_args()


def limits_of(device: str, dtype: str) -> dict[str, float | str]:
    """Operations and bytes a second that this place reaches at best."""
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, {dtype}"
        return {"place": name, "fma": peak.gpu_peak(DTYPES[dtype]), "read": peak.gpu_bandwidth()}
    return {"place": f"{torch.get_num_threads()} threads", "fma": peak.fma_peak(), "read": peak.read_bandwidth()}


def main() -> None:
    args = parse()
    cases = [c for c in CASES if re.search(args.case, c.name) and (not args.group or c.group in args.group)]
    if args.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    plan = [
        (threads, baseline, dtype, case, mode)
        for threads in args.threads or ([1, 2] if args.device == "cpu" else [torch.get_num_threads()])
        for baseline in args.sdpa
        for dtype in args.dtype
        for case in cases
        for mode in args.mode
        if not (case.forward_only and mode != "forward")
    ]
    folder = Path(__file__).parent / "results"
    results: list[Result] = []
    limits: dict[object, dict[str, float | str]] = {}
    print(report.HEADER)
    for threads, baseline, dtype, case, mode in tqdm(plan, unit="pair", leave=False):
        torch.set_num_threads(threads)
        place = dtype if args.device == "cuda" else threads
        if place not in limits:
            limits[place] = limits_of(args.device, dtype)
        fma, read = float(limits[place]["fma"]), float(limits[place]["read"])
        try:
            result = run_case(
                case, DTYPES[dtype], mode, args.seconds, fma, read, not args.no_accuracy, args.device, baseline
            )
        except BackendRefuses as reason:
            tqdm.write(f"{case.name:40} {dtype:9} {mode:17} {baseline:>9} refuses: {str(reason).splitlines()[0]}")
            continue
        results.append(result)
        tqdm.write(report.format_row(result))
        if args.name:  # after each pair, so that a run which is cut short leaves what it has
            report.write_json(results, list(limits.values()), folder / f"{args.name}.json")
    for limit in limits.values():
        fma, read = float(limit["fma"]) / 1e9, float(limit["read"]) / 1e9
        print(f"{limit['place']}: peak {fma:.0f} GFLOP/s, memory {read:.1f} GB/s")
    for name, mean in report.geometric_means(results).items():
        print(f"geometric mean, {name}: {mean:.2f}x")
    for name, result in report.options_of(results).items():
        print(f"cost over plain, {name}: {report.format_cost(result)}")
    if args.name and results:
        report.write_plot(results, folder / f"{args.name}.png")


if __name__ == "__main__":
    main()
