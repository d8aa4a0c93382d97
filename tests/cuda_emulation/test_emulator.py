"""The emulator finds each kind of bug, whatever order the threads run in, and says what is wrong."""

from __future__ import annotations

import os

import pytest
import torch

from .emulation import Device, Fault, KernelError
from .test_kernels import random_seed

CORRECT = [
    "exchange",
    "exchange in warp",
    "exchange between warps",
    "copy",
    "access",
    "blocks add with atomics",
    "pipeline",
    "pipeline of stores",
    "pipeline of a copy",
]
# The bug, and what the report must say.
FAULTY = {
    "exchange without barrier before reading": "race: a load reads shared memory|nobody has written",
    "exchange without barrier before overwriting": "race: a (store writes|load reads) shared memory",
    "exchange in warp without barrier": "race: a load reads shared memory|nobody has written",
    "exchange between warps without barrier": "race: a load reads shared memory|nobody has written",
    "exchange between warps with a barrier of one": "race: a load reads shared memory|nobody has written",
    "pipeline of a copy that is told too early": "race: a load reads shared memory|cp.async still copies",
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
    "pipeline without barrier after init": "is not initialised|uses the mbarrier .* initialised with no barrier",
    "pipeline whose producer does not wait": "race: cp.async.bulk writes|still copies|more threads arrive",
    "pipeline of stores whose producer does not wait": "race: a (store|load) .* (read|written) by|more threads arrive",
    "pipeline whose consumers do not wait": "cp.async still copies|nobody has written|more threads arrive|race: a load",
    "pipeline with wrong phase": "cp.async still copies|nobody has written|more threads arrive|deadlock|race: a load",
    "pipeline with early release": "race: cp.async.bulk writes .* read by|cp.async still copies|race: a load",
    "pipeline of stores with early release": "race: a (store|load) .* (read|written) by",
    "pipeline without barrier in warp before release": "race: cp.async.bulk writes .* read by warp 1|still copies",
    "pipeline without release": "deadlock in .* wait for the mbarrier at shared memory, byte 16, phase of parity 0",
    "pipeline that expects too few bytes": "deadlock in .* wait for the mbarrier at shared memory, byte [08],",
    "pipeline with too many arrivals": "more threads arrive at the mbarrier",
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


@needs_access_reports
@pytest.mark.parametrize("name", ["pipeline", "pipeline of stores"])
@pytest.mark.parametrize("fault", [Fault.WRONG_PHASE, Fault.EARLY_RELEASE])
def test_a_wrong_phase_or_an_early_release_anywhere_is_found(name: str, fault: Fault, device: Device) -> None:
    """At each of the eight waits and arrivals; those of the last round release buffers that nobody fills again.

    A wrong phase may let one side overtake the other by a whole round, in good order: then the result is wrong.
    """
    right = device.run_faulty_kernel(name)
    for call in range(8 if fault == Fault.WRONG_PHASE else 6):
        device.configure(random_seed(), fault, call)
        try:
            result = device.run_faulty_kernel(name)
        except KernelError:
            continue
        assert fault == Fault.WRONG_PHASE and not torch.equal(result, right), call


def test_every_kernel_is_listed_here(device: Device) -> None:
    assert set(device.faulty_kernels()) == {*CORRECT, *FAULTY}
