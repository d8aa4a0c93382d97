"""The limits that results are compared with.

Of the CPU: FMA peak and read bandwidth on as many threads as torch uses, by peak.cpp. Of a GPU: PyTorch's own matrix
product and copy.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

import torch_attn  # noqa: F401  (registers the operator that tells the instruction set)

from .measure import seconds_on_gpu

FMA_ROUNDS = 2_000_000


@cache
def library() -> ctypes.CDLL:
    out = Path(tempfile.mkdtemp()) / "peak.so"
    source = Path(__file__).with_name("peak.cpp")
    narrow = {"avx2": ["-mavx2", "-mfma"], "baseline": []}  # as if the machine had no more
    flags = narrow.get(torch.ops.torch_attn.cpu_isa(), ["-march=native"])
    subprocess.run(["g++", "-O3", *flags, "-shared", "-fPIC", source, "-o", out], check=True)
    lib = ctypes.CDLL(str(out))
    lib.fma_loop.argtypes, lib.fma_loop.restype = [ctypes.c_int64], ctypes.c_float
    lib.fma_flops.argtypes, lib.fma_flops.restype = [ctypes.c_int64], ctypes.c_double
    lib.stream_read.argtypes, lib.stream_read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_float
    return lib


def on_all_threads(call: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for _ in range(torch.get_num_threads() - 1)]
    for t in threads:
        t.start()
    call()
    for t in threads:
        t.join()


def best_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(rounds):
        start = clock()
        on_all_threads(call)
        best = min(best, clock() - start)
    return best


def gpu_peak(dtype: torch.dtype) -> float:
    """Operations a second of PyTorch's product of large square matrices: what tensor cores reach in practice."""
    n = 8192 if dtype in (torch.float16, torch.bfloat16) else 4096
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    return 2 * n**3 / best_gpu_seconds(lambda: torch.mm(a, b))


def gpu_bandwidth() -> float:
    """Bytes a second read and written by copying 2 GiB."""
    source = torch.empty(1 << 29, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / best_gpu_seconds(lambda: to.copy_(source))


def best_gpu_seconds(call: Callable[[], object], rounds: int = 10) -> float:
    call()
    return min(seconds_on_gpu(call, 3) for _ in range(rounds))


def fma_peak() -> float:
    """Floating-point operations a second in float32."""
    seconds = best_seconds(lambda: library().fma_loop(FMA_ROUNDS))
    return library().fma_flops(FMA_ROUNDS) * torch.get_num_threads() / seconds


def read_bandwidth() -> float:
    """Bytes a second read from a 512 MiB buffer, which no cache holds."""
    data = torch.zeros(1 << 27)
    share = data.numel() // torch.get_num_threads()
    seconds = best_seconds(lambda: library().stream_read(data.data_ptr(), share))
    return 4 * share * torch.get_num_threads() / seconds
