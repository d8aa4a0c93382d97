"""AddressSanitizer and UBSan find nothing in the emulated kernels: a call of each kind here, all by `make sanitize`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .emulation import compiled

ROOT = Path(__file__).resolve().parents[2]
# Every option, and every kernel of the instances that the build "sample" compiles with the sanitizers.
CALLS = [
    "test_kernels.py::test_simt_float32[everything]",
    "test_kernels.py::test_sm80_bfloat16[everything]",
    "test_kernels.py::test_sm80_bfloat16[causal]",
    "test_kernels.py::test_sm80_fused_gradients[dropout_causal_grouped-torch.bfloat16]",
    "test_kernels.py::test_sm80_fused_gradients[plain-torch.bfloat16]",
    "test_decode.py::test_bfloat16[everything-3]",
    "test_maps.py::test_statistics_of_every_dtype[everything-sm80-bfloat16]",
    "test_maps.py::test_weights_of_every_dtype[everything-mean-sm80-bfloat16]",
    "test_emulator.py::test_a_correct_kernel_passes",
]


def run(code: list[str]) -> subprocess.CompletedProcess[str]:
    def library(name: str) -> str:
        return subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()

    compiled("sample")  # before the sanitizer's runtime slows the compiler down, too
    environment = os.environ | {
        "TORCH_ATTN_EMULATION_CHECK": "sample",
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
    }
    return subprocess.run([sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True)


not_checked_already = pytest.mark.skipif(
    "TORCH_ATTN_EMULATION_CHECK" in os.environ, reason="all tests run under the check that is named"
)


@not_checked_already
def test_sanitizers_find_nothing() -> None:
    done = run(["-m", "pytest", "-x", *(f"tests/cuda_emulation/{call}" for call in CALLS)])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@not_checked_already
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("shared memory out of bounds", "use-after-poison"),
        ("store out of bounds", "use-after-poison"),
        ("load out of bounds", "use-after-poison"),
    ],
)
def test_a_kernel_that_leaves_its_memory_is_found(kernel: str, message: str) -> None:
    """By AddressSanitizer itself, which sees memory of the emulator as poisoned where a kernel has none."""
    start = "from tests.cuda_emulation.emulation import build; device = build('sample'); "
    done = run(["-c", start + f"device.run_faulty_kernel({kernel!r})"])
    assert done.returncode != 0
    assert message in done.stderr
