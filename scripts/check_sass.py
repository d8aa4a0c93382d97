"""Checks the machine code of the CUDA kernels, for which no GPU is needed: `python scripts/check_sass.py [library]`.

What no test can see: that a kernel keeps its data in registers, that it has exactly the matrix instructions its loops
plan, and that it moves memory sixteen bytes at a time. Needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "torch_attn" / "lib" / "libtorch_attn.so"
ARCHITECTURES = ("sm_80", "sm_90a")

# Matrix instructions in the unrolled loops: for each width, a plain and a full kernel (csrc/cuda/sm80).
PLANNED_HMMA = {
    "HMMA.16816.F32": {
        "forward_kernel": {64: (128, 64), 128: (128, 128), 256: (128, 128)},
        "decode_kernel": {64: (16, 16), 128: (32, 32), 256: (64, 64)},
        "query_gradient_kernel": {64: (96, 96), 128: (96, 96), 256: (192, 192)},
        "key_value_gradient_kernel": {64: (128, 128), 128: (128, 128), 256: (192, 192)},
        "all_gradients_kernel": {64: (160, 160), 128: (160, 160)},
    },
    "HMMA.1688.F32.TF32": {
        "forward_kernel": {64: (128, 128), 128: (128, 128)},
        "decode_kernel": {64: (32, 32), 128: (64, 64)},
        "query_gradient_kernel": {64: (96, 96), 128: (192, 192)},
        "key_value_gradient_kernel": {64: (128, 128), 128: (256, 256)},
    },
}
# The 16-bit ones come in two types.
SM80_KERNELS = sum(
    2 * len(widths) * (2 if instruction == "HMMA.16816.F32" else 1)
    for instruction, kernels in PLANNED_HMMA.items()
    for widths in kernels.values()
)
SIMT_KERNELS = 9
SELECTION_KERNELS = 8
# The widest kernels, with rows of 512 bytes, and one of hard attention's may spill this much, once outside their loops;
# all others nothing.
WIDEST_SPILL_BYTES = 32
WIDEST = {"HMMA.16816.F32": 256, "HMMA.1688.F32.TF32": 128}

SM80_NAME = re.compile(r"4sm80\d+([a-z_]+_kernel)I(f|\S*?\dB?Float16E)Li(\d+)ELb([01])E")
TYPES = {"f": "float", "d": "double"}
SELECTION_NAME = re.compile(r"4simt\d+(select(?:ion)?_[a-z_]+_kernel)I([fd])(?:Li\d+)?E")
SIMT_NAME = re.compile(r"4simt\d+([a-z_]+_kernel)I([fd])Li(\d+)E")


@dataclass
class Kernel:
    """One compiled kernel: how often each instruction occurs, registers, and bytes of spilled registers."""

    name: str
    instructions: Counter[str] = field(default_factory=Counter)
    registers: int = 0
    stack: int = 0

    def count(self, prefix: str, suffix: str = "") -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix) and name.endswith(suffix))


def tool(name: str) -> str:
    """A tool that pip installed, or the CUDA toolkit's."""
    installed = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    found = shutil.which(
        name, path=os.pathsep.join([str(installed), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    )
    if found is None:
        raise SystemExit(f"there is no {name}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def cuobjdump(*arguments: str) -> str:
    command = tool("cuobjdump")
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [command, *arguments], check=True, capture_output=True, text=True, env={**os.environ, "PATH": path}
    ).stdout


def disassemble(library: Path, architecture: str) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in cuobjdump("-sass", "-arch", architecture, str(library)).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            kernel = kernels.setdefault(found[1], Kernel(found[1]))
        elif kernel and (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", line)):
            kernel.instructions[found[1]] += 1
    name = ""
    for line in cuobjdump("-res-usage", "-arch", architecture, str(library)).splitlines():
        if found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif (found := re.search(r"REG:(\d+) STACK:(\d+)", line)) and name in kernels:
            kernels[name].registers, kernels[name].stack = int(found[1]), int(found[2])
    return list(kernels.values())


def check_sm80(kernel: Kernel, name: str, instruction: str, width: int, full: bool) -> list[str]:
    problems = []
    planned = PLANNED_HMMA[instruction][name][width][full]
    if not kernel.count(instruction) == kernel.count("HMMA") == planned:
        problems.append(f"{kernel.count('HMMA')} HMMA in place of {planned} {instruction}")
    if name == "all_gradients_kernel" and kernel.count("ATOM"):
        problems.append("its atomic sums wait for the old value")
    if kernel.count("LDGSTS") == 0 or kernel.count("LDGSTS") != kernel.count("LDGSTS", ".128"):
        problems.append("its asynchronous copies are not all of 16 bytes")
    if kernel.count("STG", ".128") == 0:
        problems.append("it does not store 16 bytes at a time")
    if kernel.stack > (WIDEST_SPILL_BYTES if width == WIDEST[instruction] else 0):
        problems.append(f"{kernel.stack} bytes of registers are spilled")
    return problems


def check_simt(kernel: Kernel, name: str, width: int) -> list[str]:
    problems = []
    if kernel.count("LDG", ".128") == 0:
        problems.append("it does not load 16 bytes at a time")
    if kernel.count("LDS", ".128") == 0:
        problems.append("it does not read shared memory 16 bytes at a time")
    may_spill = (name, width) == ("key_value_gradient_kernel", 128) or name == "selection_mask_gradient_kernel"
    if kernel.stack > (WIDEST_SPILL_BYTES if may_spill else 0):
        problems.append(f"{kernel.stack} bytes of registers are spilled")
    return problems


def check(library: Path, architecture: str) -> list[str]:
    """Prints a line for each kernel; returns what is wrong."""
    problems, sm80, simt, selection = [], 0, 0, 0
    for kernel in disassemble(library, architecture):
        if found := SM80_NAME.search(kernel.name):
            name, width, full = found[1], int(found[3]), found[4] == "1"
            instruction = "HMMA.1688.F32.TF32" if found[2] == "f" else "HMMA.16816.F32"
            if name not in PLANNED_HMMA[instruction]:
                continue
            dtype = "TF32" if found[2] == "f" else "BFloat16" if "BFloat16" in found[2] else "Float16"
            label = f"sm80 {name} {dtype} {width} {'full' if full else 'plain'}"
            wrong, sm80 = check_sm80(kernel, name, instruction, width, full), sm80 + 1
        elif found := SELECTION_NAME.search(kernel.name):
            label = f"simt {found[1]} {TYPES[found[2]]}"
            wrong, selection = check_simt(kernel, found[1], 0), selection + 1
        elif found := SIMT_NAME.search(kernel.name):
            name, dtype, width = found[1], TYPES[found[2]], int(found[3])
            label = f"simt {name} {dtype} {width}"
            wrong, simt = check_simt(kernel, name, width), simt + 1
        else:
            continue
        print(
            f"{architecture:7} {label:50} {kernel.registers:4} registers {kernel.stack:4} bytes spilled "
            f"{kernel.count('HMMA'):4} HMMA {'; '.join(wrong) or 'ok'}"
        )
        problems += [f"{architecture} {label}: {problem}" for problem in wrong]
    if (sm80, simt, selection) != (SM80_KERNELS, SIMT_KERNELS, SELECTION_KERNELS):
        problems.append(
            f"{architecture}: found {sm80} tensor-core, {simt} portable and {selection} of hard attention's kernels "
            f"in place of {SM80_KERNELS}, {SIMT_KERNELS} and {SELECTION_KERNELS}"
        )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    library = parser.parse_args().library
    problems = [problem for architecture in ARCHITECTURES for problem in check(library, architecture)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
