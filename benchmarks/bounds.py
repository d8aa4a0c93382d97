"""What stands in the way on AMX: the parts of attention alone, beside attention and SDPA.

    python -m benchmarks.bounds --name cpu_bounds

Times are of one thread, in nanoseconds for 16 scores (a vector of float32), of B1 H8 L2048 full attention:

- "registers": the multiplications of tiles, as if no operand had to be loaded;
- "products": the kernels' own tile products, operands and sums in the caches as attention has them;
- "vectors": maximum, exponentials, gradients of scores, splitting and rounding, with all operands in the L1 cache;
- "at most": how many times as fast as SDPA a kernel of these products could be, if everything else took no time but
  what vectors need more than products.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from . import report
from .cases import Case
from .cases import ours as attention
from .cases import torchs as sdpa
from .measure import interleave
from .peak import best_seconds
from .run import as_call

LANES = 16
LENGTH = 2048
FLAGS = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi -std=c++20".split()
MACHINE_FLAGS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mavx512bf16 -mamx-tile -mamx-bf16".split()
PIECES = {"bfloat16": 1, "float16": 2, "float32": 3}  # csrc/cpu/bfloat16/pieces.h: and products of a pass's two kinds
DOTS = {"bfloat16": 1, "float16": 4, "float32": 6}
SUMS = {"bfloat16": 1, "float16": 3, "float32": 6}
TILE_OPERATIONS = 2 * 16 * 16 * 32


@dataclass(frozen=True)
class Bound:
    dtype: str
    head_dim: int
    mode: str
    registers: float
    products: float
    vectors: float
    ours: float
    torch: float
    speedup: float
    at_most: float

    def __str__(self) -> str:
        times = f"registers {self.registers:5.1f}, products {self.products:5.1f}, vectors {self.vectors:4.1f}"
        whole = (
            f"attention {self.ours:5.1f}, SDPA {self.torch:5.1f}: {self.speedup:.2f}x of at most {self.at_most:.1f}x"
        )
        return f"{self.dtype:9} D{self.head_dim:<4} {self.mode:17} ns per 16 scores: {times}; {whole}"


@cache
def library() -> ctypes.CDLL:
    out = Path(tempfile.mkdtemp()) / "bounds.so"
    source = Path(__file__).with_name("bounds.cpp")
    subprocess.run(["g++", *FLAGS, *MACHINE_FLAGS, "-shared", "-fPIC", source, "-o", out], check=True)
    lib = ctypes.CDLL(str(out))
    lib.attention_part.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    lib.scores_a_round.restype = ctypes.c_int64
    lib.multiply_in_registers.argtypes = [ctypes.c_int64]
    return lib


def seconds_a_round(call: Callable[[int], object], rounds: int) -> float:
    """Without what a call takes beside its rounds."""
    once, often = (best_seconds(lambda n=n: call(n)) for n in (1, 1 + rounds))
    return (often - once) / rounds


def part(dtype: str, number: int, head_dim: int) -> float:
    """In ns for LANES scores."""
    lib = library()
    seconds = seconds_a_round(lambda rounds: lib.attention_part(PIECES[dtype], number, head_dim, rounds), 8)
    return 1e9 * seconds / lib.scores_a_round() * LANES


def bounds(dtype: str, head_dim: int, multiplication: float, seconds: float) -> list[Bound]:
    """multiplication: seconds that one of two tiles takes."""
    forward, backward = (
        (part(dtype, i, head_dim), part(dtype, i + 2, head_dim)) for i in range(2)
    )  # (products, vectors)
    case = Case("bound", 1, 8, LENGTH, LENGTH, head_dim)
    inputs = list(case.inputs(getattr(torch, dtype)))
    direction = torch.randn_like(inputs[0])
    products = 1e9 * multiplication * 2 * head_dim * LANES / TILE_OPERATIONS  # of a pair of matrices, one in each
    dots, sums = products * DOTS[dtype], products * SUMS[dtype]
    rows = []
    for mode, passes, registers in (
        ("forward", [forward], dots + sums),
        ("forward+backward", [forward, backward], 3 * dots + 4 * sums),
    ):
        calls = [as_call(f, inputs, direction, {}, mode) for f in (attention, sdpa)]
        timing = interleave(calls, seconds)
        ours, torchs = (1e9 * timing.best(i) / (8 * LENGTH**2) * LANES for i in range(2))
        least = sum(max(parts) for parts in passes)
        sums_of_parts = [sum(x) for x in zip(*passes, strict=True)]
        speedup = timing.speedup()[0]
        rows.append(Bound(dtype, head_dim, mode, registers, *sums_of_parts, ours, torchs, speedup, torchs / least))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"], choices=PIECES)
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on attention and SDPA, each mode")
    parser.add_argument("--name", help="write results/NAME.json beside this file")
    args = parser.parse_args()
    if torch.ops.torch_attn.cpu_isa() != "amx":
        parser.error(f"these are the parts of AMX's kernels; here {torch.ops.torch_attn.cpu_isa()} runs")
    torch.set_num_threads(1)
    multiplication = seconds_a_round(library().multiply_in_registers, 100_000) / 4
    print(f"tiles: {1e-9 * TILE_OPERATIONS / multiplication:.0f} GFLOP/s of bfloat16 in registers", flush=True)
    rows = []
    for dtype in args.dtype:
        for head_dim in args.head_dim:
            for row in bounds(dtype, head_dim, multiplication, args.seconds):
                rows.append(row)
                print(row, flush=True)
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.bounds " + " ".join(sys.argv[1:])}
        document = {"machine": machine, "results": [asdict(r) for r in rows]}
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
