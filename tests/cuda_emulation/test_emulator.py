"""The emulator finds each kind of bug, whatever order the threads run in, and says what is wrong."""

from __future__ import annotations

import os

import pytest

from .emulation import Device, KernelError

CORRECT = ["exchange", "exchange in warp", "copy", "access", "blocks add with atomics"]
# The bug, and what the report must say.
FAULTY = {
    "exchange without barrier before reading": "race: a load reads shared memory|nobody has written",
    "exchange without barrier before overwriting": "race: a (store writes|load reads) shared memory",
    "exchange in warp without barrier": "race: a load reads shared memory|nobody has written",
    "copy without wait": "cp.async still copies",
    "copy without barrier": "race: a load reads shared memory|cp.async still copies|nobody has written",
    "copy with early release": "race: .* shared memory|cp.async still copies",
    "misaligned copy": "multiples of the 16 bytes",
    "shared memory out of bounds": "out of bounds: 4 bytes at shared memory, byte 256 of 256",
    "store out of bounds": "out of bounds: 4 bytes at global memory, byte 256 of 256|outside every tensor",
    "load out of bounds": "outside every tensor",
    "store to an input": "writes to a tensor that is only read",
    "read of unwritten shared memory": "nobody has written",
    "divergent barrier": "deadlock in block .* warp 0: 1 lanes finished, 31 lanes wait for __syncthreads",
    "divergent collective": "diverges: one lane is in __.*, another in __",
    "blocks add without atomics": "race: .* another block",
}

needs_access_reports = pytest.mark.skipif(
    os.environ.get("TORCH_ATTN_EMULATION_CHECK", "races") != "races",
    reason="AddressSanitizer ends the process, and does not look for races",
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_kernel_passes(name: str, seed: int, device: Device) -> None:
    device.configure(seed)
    device.run_faulty_kernel(name)


@needs_access_reports
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", FAULTY)
def test_a_bug_is_found_and_named(name: str, seed: int, device: Device) -> None:
    device.configure(seed)
    with pytest.raises(KernelError, match=FAULTY[name]):
        device.run_faulty_kernel(name)


def test_every_kernel_is_listed_here(device: Device) -> None:
    assert set(device.faulty_kernels()) == {*CORRECT, *FAULTY}
