"""`python -m torch_attn.info` names what was built and what runs."""

import ctypes
import os
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torch_attn import _library
from torch_attn.info import explain


def info(before: Callable[[], None] | None = None, **variables: str) -> dict[str, str]:
    """What the command prints. ``before`` runs in its process, before the program starts."""
    command = [sys.executable, "-m", "torch_attn.info"]
    environment = {**os.environ, **variables}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, preexec_fn=before)
    facts = [line.strip().split("  ", 1) for line in result.stdout.splitlines() if line.startswith("  ")]
    return {name: fact.strip() for name, fact in facts}


def test_info_names_both_torch_releases() -> None:
    facts = info()
    assert facts["torch_attn"] == _library.build_info()["version"]
    assert facts["built for torch"] == torch.__version__.split("+")[0]
    assert facts["running torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA may be on where there is a GPU")
def test_info_says_why_cuda_is_off() -> None:
    assert info()["cuda"].startswith("off: ")


def test_explain_names_the_instruction_set_of_a_call_on_the_cpu() -> None:
    query = torch.randn(1, 2, 5, 16)
    explanation = explain(query, query, query, is_causal=True)
    assert explanation.tier == "cpu"
    assert str(explanation).startswith(f"cpu         serves: compiled for {torch.ops.torch_attn.cpu_isa()}\n")
    assert explain(*[query.to("meta")] * 3).tier == "composite"


@pytest.mark.skipif(bool(_library.build_info()["cuda_off_reason"]), reason="the library has no CUDA kernels")
@pytest.mark.parametrize(
    ("dtype", "sizes", "options", "tier", "text"),
    [
        (torch.float16, {}, {}, "sm80", "one kernel"),
        (torch.float16, {"L": 1, "S": 4096}, {}, "sm80", r"query heads of a group together, their keys in \d+ parts"),
        (torch.float16, {}, {"compute_capability": 75}, "simt", "sm80 .*cannot: it needs compute capability 8.0"),
        (torch.float16, {"D": 20}, {}, "simt", "sm80 .*cannot: head_dim and value_dim must be multiples of 8"),
        (torch.float32, {}, {}, "simt", "torch.backends.cuda.matmul.allow_tf32 does not allow"),
        (torch.float64, {}, {}, "simt", "it takes float16, bfloat16 and float32"),
        (torch.float16, {"D": 256}, {"backward": True}, "sm80", "one kernel for grad_query, one for"),
        (torch.float16, {"D": 256}, {"backward": True, "compute_capability": 86}, "simt", "shared memory is too small"),
        (torch.float16, {}, {"backward": True, "multiprocessors": 1}, "sm80", "which adds with atomics"),
        (torch.float16, {}, {"operation": "attention_weights"}, "sm80", "on tensor cores"),
        (torch.float16, {"D": 256}, {"operation": "attention_statistics", "backward": True}, "sm80", "on tensor cores"),
        (torch.float64, {}, {"operation": "attention_weights"}, "simt", "it takes float16, bfloat16 and float32"),
        (torch.float16, {"D": 12}, {"operation": "attention_statistics"}, "simt", "head_dim must be a multiple of 8"),
        (torch.float16, {}, {"operation": "hard_attention"}, "sm80", "on tensor cores"),
        (torch.float16, {"D": 136}, {"operation": "hard_attention"}, "simt", "at most 128"),
        (
            torch.float16,
            {},
            {"operation": "hard_attention", "backward": True},
            "simt",
            "no gradients of hard",
        ),
    ],
)
def test_explain_says_why_a_tier_is_passed_over(
    dtype: torch.dtype, sizes: dict[str, int], options: dict, tier: str, text: str
) -> None:
    size = {"L": 128, "S": 128, "D": 64} | sizes
    query = torch.empty(1, 2, size["L"], size["D"], dtype=dtype)
    key = torch.empty(1, 2, size["S"], size["D"], dtype=dtype)
    explanation = explain(query, key, key, **({"compute_capability": 80} | options))
    assert explanation.tier == tier
    assert re.search(text, str(explanation)), explanation


def test_explain_asks_for_what_it_needs() -> None:
    query = torch.empty(1, 2, 5, 16)
    assert explain(query, query, operation="attention_weights").tier == "cpu"
    with pytest.raises(ValueError, match="operation must be one of attention, attention_weights, .*but it is maps"):
        explain(query, query, operation="maps")
    with pytest.raises(ValueError, match="value must be given where operation is attention"):
        explain(query, query)


@pytest.mark.skipif(bool(_library.build_info()["cuda_off_reason"]), reason="the library has no CUDA kernels")
def test_explain_heeds_what_is_asked_of_torch() -> None:
    query = torch.empty(1, 2, 128, 64)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.use_deterministic_algorithms(True)
        assert "products in TF32" in str(explain(query, query, query, compute_capability=80))
        half = query.half()
        backward = explain(half, half, half, compute_capability=80, multiprocessors=1, backward=True)
        assert "one for grad_key and grad_value" in str(backward)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("isa", torch.ops.torch_attn.cpu_isas())
def test_info_names_the_forced_instruction_set(isa: str) -> None:
    facts = info(TORCH_ATTN_CPU_ISA=isa)
    assert facts["cpu"] == f"on: {isa} (forced by TORCH_ATTN_CPU_ISA={isa})"
    assert isa in facts["cpu instruction sets"].split(", ")


def deny_tile_registers() -> None:
    """From now on Linux refuses this process AMX's registers, as if the machine had none: by a seccomp filter on
    arch_prctl(ARCH_REQ_XCOMP_PERM)."""
    load_number, load_argument = struct.pack("HBBI", 0x20, 0, 0, 0), struct.pack("HBBI", 0x20, 0, 0, 16)
    is_arch_prctl, is_request = struct.pack("HBBI", 0x15, 0, 3, 158), struct.pack("HBBI", 0x15, 0, 1, 0x1023)
    refuse, allow = struct.pack("HBBI", 0x06, 0, 0, 0x00050001), struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    program = ctypes.create_string_buffer(load_number + is_arch_prctl + load_argument + is_request + refuse + allow)
    rules = struct.pack("HxxxxxxP", 6, ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, filter_mode, rules):
        raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.skipif(
    "avx512_bf16" not in torch.ops.torch_attn.cpu_isas() or platform.system() != "Linux",
    reason="needs a CPU with AVX512_BF16",
)
def test_vdpbf16ps_is_the_default_only_where_it_is_fast() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    slow = "GenuineIntel" in flags and "avx512_fp16" in flags
    facts = info(deny_tile_registers, TORCH_ATTN_CPU_ISA="")
    assert facts["cpu instruction sets"].endswith("avx512, avx512_bf16")
    assert facts["cpu"].startswith("on: avx512 " if slow else "on: avx512_bf16 ")
