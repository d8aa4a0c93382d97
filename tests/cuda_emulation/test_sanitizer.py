"""AddressSanitizer and UBSan find nothing in the emulated kernels: a call of each kind here, all by `make sanitize`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Every option, every width of tiles, and every kernel of the tensor-core tier once.
CALLS = "everything or wide_value or dim_256_value_200 or dim_128_causal or several_tiles_of_rows or correct_kernel"


@pytest.mark.skipif("TORCH_ATTN_EMULATION_CHECK" in os.environ, reason="all tests run under the check that is named")
def test_sanitizers_find_nothing() -> None:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        "TORCH_ATTN_EMULATION_CHECK": "address",
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": runtime.stdout.strip(),
    }
    command = [sys.executable, "-m", "pytest", "tests/cuda_emulation", "-x", "-k", CALLS]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
