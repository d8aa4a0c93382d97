"""What stands in the way on AMX: the parts of attention alone, beside attention and SDPA.

    python -m benchmarks.bounds --name cpu_bounds

Times are of one thread, in nanoseconds for 16 scores (a vector of float32), of B1 H8 L2048 full attention:

- "tiles": the multiplications of tiles, operands in the L1 cache, at the clock that they leave the core;
- "vectors": maximum, exponentials, gradients of scores, splitting and rounding, alone, operands in the L1 cache;
- "ports": what both need of a core's two ports for vectors, of which a multiplication of tiles takes one for 16 cycles;
  vectors at the clock of tiles. Nothing can be faster; "at most" is how many times as fast as SDPA that is;
- "products": the kernels' own tile products, with their operands and sums in the caches as attention has them.
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
    tiles: float
    vectors: float
    ports: float
    products: float
    ours: float
    torch: float
    speedup: float
    at_most: float

    def __str__(self) -> str:
        alone = f"tiles {self.tiles:5.1f}, vectors {self.vectors:4.1f}, products {self.products:5.1f}"
        times = f"{alone}, on the ports {self.ports:5.1f}"
        whole = (
            f"attention {self.ours:5.1f}, SDPA {self.torch:5.1f}: {self.speedup:.2f}x of at most {self.at_most:.1f}x"
        )
        return f"{self.dtype:9} D{self.head_dim:<4} {self.mode:17} ns per 16 scores: {times}; {whole}"


@dataclass(frozen=True)
class Beside:
    """A multiplication of tiles and multiply-adds of vectors at the same time."""

    vectors: int
    nanoseconds: float
    gigahertz: float

    def __str__(self) -> str:
        cycles = (
            f"{self.nanoseconds:.2f} ns, {self.nanoseconds * self.gigahertz:.1f} cycles of {self.gigahertz:.2f} GHz"
        )
        return f"a multiplication of tiles with {self.vectors:2} multiply-adds of vectors beside it: {cycles}"


@dataclass(frozen=True)
class Parts:
    """Of one pass, in ns for LANES scores."""

    tiles: float
    vectors: float
    products: float

    def ports(self, slower: float) -> float:
        """slower: how many times as long vectors take at the clock of tiles."""
        return max(self.tiles, self.tiles / 2 + self.vectors * slower)


@cache
def library() -> ctypes.CDLL:
    out = Path(tempfile.mkdtemp()) / "bounds.so"
    source = Path(__file__).with_name("bounds.cpp")
    subprocess.run(["g++", *FLAGS, *MACHINE_FLAGS, "-shared", "-fPIC", source, "-o", out], check=True)
    lib = ctypes.CDLL(str(out))
    lib.attention_part.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    lib.scores_a_round.restype = ctypes.c_int64
    lib.multiply_beside.argtypes = [ctypes.c_int, ctypes.c_int64, *[ctypes.POINTER(ctypes.c_double)] * 2]
    return lib


def seconds_a_round(call: Callable[[int], object], rounds: int) -> float:
    """Without what a call takes beside its rounds."""
    once, often = (best_seconds(lambda n=n: call(n)) for n in (1, 1 + rounds))
    return (often - once) / rounds


def beside(vectors: int) -> Beside:
    def measure() -> tuple[float, float]:
        results = [ctypes.c_double(), ctypes.c_double()]
        library().multiply_beside(vectors, 100, *results)
        return results[0].value, results[1].value

    nanoseconds, gigahertz = zip(*(measure() for _ in range(7)), strict=True)  # wall time, which others may disturb
    return Beside(vectors, min(nanoseconds), max(gigahertz))


def part(dtype: str, number: int, head_dim: int) -> float:
    """In ns for LANES scores."""
    lib = library()
    seconds = seconds_a_round(lambda rounds: lib.attention_part(PIECES[dtype], number, head_dim, rounds), 8)
    return 1e9 * seconds / lib.scores_a_round() * LANES


def bounds(dtype: str, head_dim: int, tiles: Beside, vectors: Beside, seconds: float) -> list[Bound]:
    """tiles, vectors: what each does alone."""
    case = Case("bound", 1, 8, LENGTH, LENGTH, head_dim)
    inputs = list(case.inputs(getattr(torch, dtype)))
    direction = torch.randn_like(inputs[0])
    product = tiles.nanoseconds * 2 * head_dim * LANES / TILE_OPERATIONS  # of two matrices of one piece, LANES of it
    dots, sums = product * DOTS[dtype], product * SUMS[dtype]
    forward = Parts(dots + sums, part(dtype, 2, head_dim), part(dtype, 0, head_dim))
    backward = Parts(2 * dots + 3 * sums, part(dtype, 3, head_dim), part(dtype, 1, head_dim))
    rows = []
    for mode, passes in (("forward", [forward]), ("forward+backward", [forward, backward])):
        calls = [as_call(f, inputs, direction, {}, mode) for f in (attention, sdpa)]
        timing = interleave(calls, seconds)
        ours, torchs = (1e9 * timing.best(i) / (8 * LENGTH**2) * LANES for i in range(2))
        ports = sum(each.ports(vectors.gigahertz / tiles.gigahertz) for each in passes)
        totals = [sum(getattr(each, name) for each in passes) for name in ("tiles", "vectors", "products")]
        speedup = timing.speedup()[0]
        rows.append(Bound(dtype, head_dim, mode, *totals[:2], ports, totals[2], ours, torchs, speedup, torchs / ports))
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
    shared = [beside(vectors) for vectors in (0, 8, 16, 24, 32)]
    alone = beside(-32)
    print(*shared, f"without tiles the clock is {alone.gigahertz:.2f} GHz", sep="\n", flush=True)
    rows = []
    for dtype in args.dtype:
        for head_dim in args.head_dim:
            for row in bounds(dtype, head_dim, shared[0], alone, args.seconds):
                rows.append(row)
                print(row, flush=True)
    if args.name:
        machine = report.machine() | {"command": "python -m benchmarks.bounds " + " ".join(sys.argv[1:])}
        document = {
            "machine": machine,
            "vectors_beside_tiles": [asdict(x) for x in shared],
            "gigahertz_without_tiles": alone.gigahertz,
            "results": [asdict(r) for r in rows],
        }
        path = Path(__file__).parent / "results" / f"{args.name}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
