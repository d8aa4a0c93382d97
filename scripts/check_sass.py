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
from dataclasses import dataclass, field, replace
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "torch_attn" / "lib" / "libtorch_attn.so"
ARCHITECTURES = ("sm_80", "sm_90a")

# Matrix instructions in the unrolled loops: for each width, a plain and a full kernel (csrc/cuda/sm80). A full kernel
# of the backward pass has q·k twice: with a softcap it is computed anew.
PLANNED_HMMA = {
    "HMMA.16816.F32": {
        "forward_kernel": {64: (128, 64), 128: (128, 128), 256: (128, 128)},
        "decode_kernel": {64: (16, 16), 128: (32, 32), 256: (64, 64)},
        "query_gradient_kernel": {64: (96, 128), 128: (96, 128), 256: (192, 256)},
        "key_value_gradient_kernel": {64: (128, 160), 128: (128, 160), 256: (192, 256)},
        "all_gradients_kernel": {64: (160, 192), 128: (160, 192)},
    },
    "HMMA.1688.F32.TF32": {
        "forward_kernel": {64: (128, 128), 128: (128, 128)},
        "decode_kernel": {64: (32, 32), 128: (64, 64)},
        "query_gradient_kernel": {64: (96, 128), 128: (192, 256)},
        "key_value_gradient_kernel": {64: (128, 160), 128: (256, 320)},
    },
}
# The same of kernels that come in one kind for each type: for 16-bit types and for TF32, by width where they have one.
PLANNED_HMMA_OF_TYPE = {
    "map_statistics_kernel": (32, 64),
    "map_column_kernel": (32, 64),
    "map_weights_kernel": (32, 64),
    "map_row_terms_kernel": (32, 64),
    "map_query_gradient_kernel": (96, 192),
    "map_key_gradient_kernel": (96, 192),
    "map_mask_gradient_kernel": (32, 64),
    "mask_gradient_kernel": (64, 128),
}
PLANNED_HMMA_OF_WIDTH = {"select_keys_kernel": {64: 32, 128: 64}}  # in both 16-bit types
# Of those, the ones that write rows of a tensor.
STORES_ROWS = ("map_weights_kernel", "map_query_gradient_kernel", "map_key_gradient_kernel")

# Warpgroup matrix instructions of the Hopper tier's kernels (csrc/cuda/sm90), by width; in its machine code alone.
PLANNED_HGMMA = {
    "forward_kernel": {64: 16, 128: 32},
    "short_forward_kernel": {64: 24},
    "all_gradients_kernel": {64: 64, 128: 64},
}

# How many kernels there are of each family. The 16-bit ones come in two types.
EXPECTED = {
    "tensor-core": sum(
        2 * len(widths) * (2 if instruction == "HMMA.16816.F32" else 1)
        for instruction, kernels in PLANNED_HMMA.items()
        for widths in kernels.values()
    ),
    "Hopper": 2 * sum(len(widths) for widths in PLANNED_HGMMA.values()),
    "tensor-core map": 3 * len(PLANNED_HMMA_OF_TYPE),
    "tensor-core selection": 2 * sum(len(widths) for widths in PLANNED_HMMA_OF_WIDTH.values()),
    "portable": 11,
    "portable map": 2 * 7,
    "portable selection": 8,
}
# Full kernels, which have branches for every option, may spill a few registers around these, and those with rows of 512
# bytes more.
FULL_SPILL_BYTES, WIDEST_SPILL_BYTES = 32, 144
# These may spill a few registers, by tier, kernel and width: what the starts of packed sequences and the maps' options
# cost beside their accumulators, of which a float64 takes two registers. All others nothing.
MAY_SPILL = {
    ("sm90", "forward_kernel", 64): 8,
    ("sm80", "forward_kernel", 128): 24,
    ("sm80", "all_gradients_kernel", 128): 8,
    ("sm80", "map_query_gradient_kernel", 0): 104,
    ("sm80", "map_key_gradient_kernel", 0): 16,
    ("sm80", "select_keys_kernel", 128): 16,
    ("simt", "map_row_terms_kernel", 0): 40,
    ("simt", "forward_kernel", 64): 96,
    ("simt", "query_gradient_kernel", 64): 64,
    ("simt", "key_value_gradient_kernel", 128): 32,
    ("simt", "map_column_kernel", 0): 8,
    ("simt", "select_keys_kernel", 0): 16,
    ("simt", "selection_key_gradient_kernel", 64): 8,
    ("simt", "selection_mask_gradient_kernel", 0): 32,
}
WIDEST = {"HMMA.16816.F32": 256, "HMMA.1688.F32.TF32": 128}

TYPES = {"f": "float", "d": "double"}
TYPE = r"(f|d|\S*?\d(?:BFloat16|Float16)E)"
SM80_NAME = re.compile(rf"4sm80\d+([a-z_]+_kernel)I{TYPE}(?:Li(\d+)E)?(?:Lb([01])E)?E")
SM90_NAME = re.compile(rf"4sm90\d+([a-z_]+_kernel)I{TYPE}Li(\d+)EE")
SIMT_NAME = re.compile(r"4simt\d+([a-z_]+_kernel)I([fd])(?:Li(\d+)E)?E")


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


@dataclass
class Plan:
    """What is expected of a kernel."""

    family: str
    label: str
    hmma: str = ""  # the matrix instruction, HMMA.… or HGMMA; empty: none
    hmma_count: int = 0
    stores_rows: bool = False
    spill_bytes: int = 0
    empty: bool = False  # on this architecture it has no body


def type_name(mangled: str) -> str:
    return TYPES.get(mangled) or ("BFloat16" if "BFloat16" in mangled else "Float16")


def plan_of(name: str) -> Plan | None:
    """None: a kernel of which nothing is expected."""
    if found := SM80_NAME.search(name):
        kernel, is_float = found[1], found[2] == "f"
        instruction = "HMMA.1688.F32.TF32" if is_float else "HMMA.16816.F32"
        label = f"sm80 {kernel} {'TF32' if is_float else type_name(found[2])}"
        if kernel in PLANNED_HMMA_OF_TYPE:
            count = PLANNED_HMMA_OF_TYPE[kernel][is_float]
            stores_rows = kernel in STORES_ROWS
            return Plan(
                "tensor-core map", label, instruction, count, stores_rows, MAY_SPILL.get(("sm80", kernel, 0), 0)
            )
        width = int(found[3] or 0)
        if kernel in PLANNED_HMMA_OF_WIDTH:
            count = PLANNED_HMMA_OF_WIDTH[kernel][width]
            spill_bytes = MAY_SPILL.get(("sm80", kernel, width), 0)
            return Plan("tensor-core selection", f"{label} {width}", instruction, count, spill_bytes=spill_bytes)
        if kernel not in PLANNED_HMMA[instruction] or found[4] is None:
            return None
        full = found[4] == "1"
        return Plan(
            "tensor-core",
            f"{label} {width} {'full' if full else 'plain'}",
            instruction,
            PLANNED_HMMA[instruction][kernel][width][full],
            True,
            max(
                WIDEST_SPILL_BYTES if width == WIDEST[instruction] else 0,
                FULL_SPILL_BYTES if full else 0,
                MAY_SPILL.get(("sm80", kernel, width), 0),
            ),
        )
    if found := SM90_NAME.search(name):
        kernel, width = found[1], int(found[3])
        label = f"sm90 {kernel} {type_name(found[2])} {width}"
        spill_bytes = MAY_SPILL.get(("sm90", kernel, width), 0)
        return Plan("Hopper", label, "HGMMA", PLANNED_HGMMA[kernel][width], True, spill_bytes)
    if found := SIMT_NAME.search(name):
        kernel, width = found[1], int(found[3] or 0)
        family = "portable"
        if kernel.startswith("select"):
            family = "portable selection"
        elif kernel.startswith("map_"):
            family = "portable map"
        elif width == 0 and kernel != "mask_gradient_kernel":
            return None
        spill_bytes = MAY_SPILL.get(("simt", kernel, width), 0)
        return Plan(family, f"simt {kernel} {type_name(found[2])} {width or ''}".rstrip(), spill_bytes=spill_bytes)
    return None


def problems_of(kernel: Kernel, plan: Plan) -> list[str]:
    problems = []
    if plan.empty:
        return ["it has a body"] if any(kernel.count(name) for name in ("LDG", "STG", "LDS", "HMMA")) else []
    if plan.hmma:
        matrix_instructions = kernel.count("HMMA") + kernel.count("HGMMA")
        if not kernel.count(plan.hmma) == matrix_instructions == plan.hmma_count:
            problems.append(f"{matrix_instructions} matrix instructions in place of {plan.hmma_count} {plan.hmma}")
        # Where the compiler gives up on keeping several under way, it waits for each one.
        if plan.hmma == "HGMMA" and 4 * kernel.count("WARPGROUP.DEPBAR") > plan.hmma_count:
            problems.append("its warpgroup matrix instructions are waited for one by one")
        if "all_gradients" in plan.label and kernel.count("ATOM"):
            problems.append("its atomic sums wait for the old value")
        if kernel.count("LDGSTS") == 0 or kernel.count("LDGSTS") != kernel.count("LDGSTS", ".128"):
            problems.append("its asynchronous copies are not all of 16 bytes")
        if plan.stores_rows and kernel.count("STG", ".128") == 0:
            problems.append("it does not store 16 bytes at a time")
    else:
        if kernel.count("LDG", ".128") == 0:
            problems.append("it does not load 16 bytes at a time")
        if kernel.count("LDS", ".128") == 0:
            problems.append("it does not read shared memory 16 bytes at a time")
    if kernel.stack > plan.spill_bytes:
        problems.append(f"{kernel.stack} bytes of registers are spilled")
    return problems


def check(library: Path, architecture: str) -> list[str]:
    """Prints a line for each kernel; returns what is wrong."""
    problems, found = [], Counter[str]()
    for kernel in disassemble(library, architecture):
        plan = plan_of(kernel.name)
        if plan is None:
            continue
        if plan.family == "Hopper" and architecture != "sm_90a":
            plan = replace(plan, hmma="", hmma_count=0, empty=True)
        found[plan.family] += 1
        wrong = problems_of(kernel, plan)
        print(
            f"{architecture:7} {plan.label:50} {kernel.registers:4} registers {kernel.stack:4} bytes spilled "
            f"{kernel.count('HMMA') + kernel.count('HGMMA'):4} HMMA {'; '.join(wrong) or 'ok'}"
        )
        problems += [f"{architecture} {plan.label}: {problem}" for problem in wrong]
    if found != EXPECTED:
        problems.append(f"{architecture}: found {dict(found)} kernels in place of {EXPECTED}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    library = parser.parse_args().library
    built = set(re.findall(r"\.(sm_\d+a?)\.", cuobjdump("-lelf", str(library))))
    architectures = [architecture for architecture in ARCHITECTURES if architecture in built]
    problems = [problem for architecture in architectures for problem in check(library, architecture)]
    if not architectures:
        problems = [f"the library holds machine code for {sorted(built)}, and plans are for {ARCHITECTURES}"]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
