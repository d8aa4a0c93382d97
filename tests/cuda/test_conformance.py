"""The emulator's version of each PTX instruction does what torch computes and, where there is a GPU, what that does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ..cuda_emulation.emulation import build
from ..oracle import rounded_to_tf32

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = [torch.float16, torch.bfloat16]


def run(library: ctypes.CDLL, inputs: Tensor) -> Tensor:
    """inputs: (32, 32) of a 16-bit dtype. Returns the kernel's words as (32, 20) int32."""
    words = torch.empty(32, 20, dtype=torch.int32)
    pointers = ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(words.data_ptr())
    assert library.run_conformance(ctypes.c_bool(inputs.dtype == torch.bfloat16), *pointers) == 0
    return words


def run_tf32(library: ctypes.CDLL, inputs: Tensor) -> Tensor:
    """inputs: (32, 16) float32. Returns the kernel's words as (32, 8) int32."""
    words = torch.empty(32, 8, dtype=torch.int32)
    assert library.run_tf32_conformance(ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(words.data_ptr())) == 0
    return words


def floats(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.float32)


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    return build("races").lib


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The same file, compiled for the GPU of this machine."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not torch.cuda.is_available() or not Path(nvcc).exists():
        pytest.skip("needs a GPU, a CUDA build of torch and nvcc")
    library = tmp_path_factory.mktemp("conformance") / "conformance.so"
    options = ["-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{CSRC}"]
    subprocess.run([nvcc, *options, str(HERE / "conformance.cu"), "-o", str(library)], check=True)
    yield ctypes.CDLL(str(library))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulation_computes_what_torch_does(dtype: torch.dtype, emulated: ctypes.CDLL) -> None:
    inputs = torch.randn(32, 32).to(dtype)
    words = run(emulated, inputs)
    x, y = inputs[:, 0].float(), inputs[:, 1].float()
    assert torch.equal(floats(words[:, 0]), x)
    assert torch.equal(floats(words[:, 1]), y)
    assert torch.equal(
        words[:, 2].contiguous().view(dtype).view(32, 2), torch.stack([x * 1.0001, y * 0.9999], 1).to(dtype)
    )
    torch.testing.assert_close(floats(words[:, 3]), torch.exp2(x), rtol=3e-7, atol=0)
    assert not words[:, 4].any()

    lane = torch.arange(32)
    group, pair = lane // 4, 2 * (lane % 4)
    matrices = inputs[:, :8].view(4, 8, 8)
    for first, loaded in ((5, matrices), (9, matrices.transpose(1, 2))):
        for m in range(4):
            elements = words[:, first + m].contiguous().view(dtype).view(32, 2)
            assert torch.equal(elements, torch.stack([loaded[m, group, pair], loaded[m, group, pair + 1]], 1))

    a, b, c = torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8)
    for e in range(2):
        for i in range(4):
            a[group + 8 * (i % 2), pair + e + 8 * (i // 2)] = inputs[:, 8 + 2 * i + e].float()
        for i in range(2):
            b[pair + e + 8 * i, group] = inputs[:, 16 + 2 * i + e].float()
    for i in range(4):
        c[group + 8 * (i // 2), pair + i % 2] = inputs[:, 20 + 2 * i].float()
    d = a @ b + c
    for i in range(4):
        torch.testing.assert_close(
            floats(words[:, 13 + i]), d[group + 8 * (i // 2), pair + i % 2], rtol=1e-5, atol=1e-5
        )

    own = inputs.view(torch.int32)[:, 0]
    assert torch.equal(words[:, 17], own[lane ^ 5])
    assert torch.equal(words[:, 18], own[(lane * 7 + 3) % 32])
    assert torch.equal(words[:, 19], own[torch.where(lane + 3 < 32, lane + 3, lane)])


def tf32_inputs() -> Tensor:
    """Random numbers; among those to be rounded, ties of either sign and what rounds up to the next power of two."""
    inputs = torch.randn(32, 16)
    ties = torch.randint(1 << 10, (32,), dtype=torch.int32) << 13 | 0x3F801000 | (torch.randint(2, (32,)).int() << 31)
    inputs[:, 0] = ties.view(torch.float32)
    inputs[::4, 1] = torch.tensor(0x3FFFFFFF, dtype=torch.int32).view(torch.float32)
    inputs[1::4, 1] = 0.0
    return inputs


def test_emulation_of_tf32_computes_what_torch_does(emulated: ctypes.CDLL) -> None:
    inputs = tf32_inputs()
    words = run_tf32(emulated, inputs)
    rounded = rounded_to_tf32(inputs)
    assert torch.equal(floats(words[:, :4]), rounded[:, :4])
    assert not (words[:, :4] & 0x1FFF).any()
    assert (rounded - inputs).abs().div(inputs.abs().clamp_min(1e-30)).max() <= 2**-11
    tie_away = torch.where(inputs[:, 0] > 0, rounded[:, 0] > inputs[:, 0], rounded[:, 0] < inputs[:, 0])
    assert tie_away.all()

    group, t = torch.arange(32) // 4, torch.arange(32) % 4
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    for i in range(4):
        a[group + 8 * (i % 2), t + 4 * (i // 2)] = rounded[:, i]
        c[group + 8 * (i // 2), 2 * t + i % 2] = inputs[:, 12 + i]
    for i in range(2):
        b[t + 4 * i, group] = rounded[:, 4 + i]
    d = a @ b + c
    for i in range(4):
        actual = floats(words[:, 4 + i])
        torch.testing.assert_close(actual, d[group + 8 * (i // 2), 2 * t + i % 2], rtol=1e-5, atol=1e-5)


def test_gpu_computes_what_the_emulation_of_tf32_does(emulated: ctypes.CDLL, compiled: ctypes.CDLL) -> None:
    inputs = tf32_inputs()
    expected, actual = run_tf32(emulated, inputs), run_tf32(compiled, inputs)
    assert torch.equal(actual[:, :4], expected[:, :4])
    torch.testing.assert_close(floats(actual[:, 4:]), floats(expected[:, 4:]), rtol=1e-5, atol=1e-5)


def check_mbarriers(library: ctypes.CDLL) -> None:
    inputs = torch.randint(1 << 20, (512,), dtype=torch.int32)
    words = torch.empty_like(inputs)
    pointers = ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(words.data_ptr())
    assert library.run_mbarrier_conformance(*pointers) == 0
    assert torch.equal(words, inputs + inputs.flip(0))


def test_emulated_mbarriers_and_bulk_copies_keep_their_order(emulated: ctypes.CDLL) -> None:
    check_mbarriers(emulated)


def test_mbarriers_and_bulk_copies_of_the_gpu_keep_their_order(compiled: ctypes.CDLL) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    check_mbarriers(compiled)


def check_stores(library: ctypes.CDLL) -> None:
    inputs = torch.randint(1 << 30, (32, 16), dtype=torch.int32)
    sums = torch.empty(32, 4)
    pointers = ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(sums.data_ptr())
    assert library.run_stores_conformance(*pointers) == 0
    # Lane 8m + r receives row r of matrix m, of which lanes 4r, 4r + 1, … held a pair of elements each.
    rows = inputs[:, :4].view(8, 4, 4).permute(2, 0, 1).reshape(32, 4)
    assert torch.equal(sums, 2 * (rows >> 8).float())


def test_emulated_stores_put_elements_where_they_belong(emulated: ctypes.CDLL) -> None:
    check_stores(emulated)


def test_stores_of_the_gpu_put_elements_where_they_belong(compiled: ctypes.CDLL) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs sm_90")
    check_stores(compiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_computes_what_the_emulation_does(dtype: torch.dtype, emulated: ctypes.CDLL, compiled: ctypes.CDLL) -> None:
    inputs = torch.randn(32, 32).to(dtype)
    expected, actual = run(emulated, inputs), run(compiled, inputs)
    rounded = [3, 13, 14, 15, 16]  # 2^x is approximate, and the order of mma's additions is the hardware's own
    exact = [i for i in range(20) if i not in rounded]
    assert torch.equal(actual[:, exact], expected[:, exact])
    torch.testing.assert_close(floats(actual[:, rounded]), floats(expected[:, rounded]), rtol=1e-5, atol=1e-5)
