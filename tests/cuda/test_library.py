"""The CUDA kernels are in the library, whatever torch it is loaded by, and their machine code is as planned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_attn._library import build_info

ROOT = Path(__file__).resolve().parents[2]

needs_cuda_build = pytest.mark.skipif(bool(build_info()["cuda_off_reason"]), reason="the library has no CUDA kernels")


@needs_cuda_build
@pytest.mark.parametrize("operator", ["attention_forward", "attention_backward", "dropout_keep_mask"])
def test_operator_has_a_cuda_kernel(operator: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_attn::{operator}", "CUDA")


@needs_cuda_build
def test_machine_code_is_as_planned() -> None:
    pytest.importorskip("nvidia.cu13", reason="needs nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "check_sass.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
