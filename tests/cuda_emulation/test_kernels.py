"""The CUDA kernels, emulated, are as accurate as torch's own math, forward and backward, with every option.

Each test draws its thread schedule as it draws its inputs; the emulator also checks every access for races and bounds.
"""

from __future__ import annotations

import pytest
import torch

from ..cases import CASE_BY_NAME, CASES, Case
from ..oracle import Call, max_error, run_reference
from .emulation import Device, Fault, KernelError, Run, accumulator, run_on

HALF = [torch.bfloat16, torch.float16]


def draw_call(case: Case, dtype: torch.dtype, grad_logsumexp: bool = True) -> Call:
    query, key, value = case.tensors(dtype)
    rows = (case.batch, case.heads, case.query_length)
    # torch's own derivative of logsumexp is not exact where it is as large as −1e9.
    grad_logsumexp = grad_logsumexp and case.name != "extreme_mask_rows"
    return Call(
        query,
        key,
        value,
        case.kwargs(dtype),
        torch.randn(*rows, case.value_dim).to(dtype),
        torch.randn(rows, dtype=accumulator(dtype)) if grad_logsumexp else None,
    )


def random_rng_state() -> tuple[int, int]:
    return int(torch.randint(2**62, ())), int(torch.randint(2**33, ()))


def random_seed() -> int:
    return int(torch.randint(1, 2**31, ()))


def assert_accurate(call: Call, actual: dict[str, torch.Tensor], keep: torch.Tensor | None) -> None:
    """Each error is within 2x (gradients 3x) of torch's own.

    Torch computes in the call's dtype, except that 16-bit forward results are judged by float32 math, rounded. Where
    torch's error happens to vanish, some units in the last place of the accumulator are granted.
    """
    dtype = call.query.dtype
    exact = run_reference(call.to(torch.float64), keep)
    forward = run_reference(call.to(accumulator(dtype)), keep)
    gradients = run_reference(call.to(dtype), keep)
    assert actual.keys() == exact.keys()
    units = 64 if dtype == torch.float64 else 4
    for name, value in actual.items():
        yardstick = (gradients if name.startswith("grad") else forward)[name].to(value.dtype)
        factor = 3 if name.startswith("grad") else 2
        finite = exact[name][exact[name].isfinite()]
        magnitude = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        torch_error = max_error(yardstick, exact[name])
        bound = factor * torch_error + units * torch.finfo(accumulator(dtype)).eps * magnitude
        error = max_error(value, exact[name])
        assert error <= bound, f"{name}: error {error:.3g} exceeds {factor} x torch's {torch_error:.3g}"


def check_case(device: Device, tier: str, case: Case, dtype: torch.dtype) -> None:
    call = draw_call(case, dtype)
    device.force_tier(tier)
    device.configure(random_seed())
    assert_accurate(call, *run_on(device, call, random_rng_state()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_simt_float32(case: Case, device: Device) -> None:
    check_case(device, "simt", case, torch.float32)


# Each code path once more in the other types.
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("name", ["odd_dims", "wide_value", "float_mask_causal", "everything"])
def test_simt_other_types(name: str, dtype: torch.dtype, device: Device) -> None:
    check_case(device, "simt", CASE_BY_NAME[name], dtype)


WIDE_CASES = [
    Case("wider_than_a_block", batch=1, heads=1, kv_heads=1, head_dim=150, value_dim=200),
    Case("head_dim_zero", head_dim=0, options={"scale": 1.0}),
    Case("value_dim_zero", value_dim=0),
    Case("no_keys", key_length=0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_simt_serves_any_size(case: Case, dtype: torch.dtype, device: Device) -> None:
    check_case(device, "simt", case, dtype)


@pytest.mark.parametrize("case", [Case("no_batch", batch=0), Case("no_rows", query_length=0)], ids=str)
def test_an_empty_call_does_nothing(case: Case, device: Device) -> None:
    results, _ = run_on(device, draw_call(case, torch.float32), (0, 0))
    for name in ("grad_key", "grad_value"):
        assert not results[name].any()


def test_each_tier_answers(device: Device) -> None:
    def tiers(case: Case, dtype: torch.dtype) -> dict[str, str]:
        return Run(device, draw_call(case, dtype), (0, 0)).tiers()

    assert tiers(CASE_BY_NAME["plain"], torch.float32)["simt"] == ""
    device.force_tier("simt")
    assert tiers(CASE_BY_NAME["plain"], torch.bfloat16)["simt"] == ""


def test_dropout_bits_are_those_of_the_cpu_kernels(device: Device) -> None:
    case = CASE_BY_NAME["dropout_causal_grouped"]
    rng_state, p = random_rng_state(), case.options["dropout_p"]
    run = Run(device, draw_call(case, torch.float32), rng_state)
    sizes = (case.batch, case.heads, case.query_length, case.key_length)
    expected = torch.ops.torch_attn.dropout_keep_mask(torch.tensor(rng_state), *sizes, p)
    assert torch.equal(run.keep_mask(), expected)


def test_results_do_not_depend_on_the_schedule(device: Device) -> None:
    call, rng_state = draw_call(CASE_BY_NAME["everything"], torch.float32), random_rng_state()
    first, _ = run_on(device, call, rng_state)
    device.configure(random_seed())
    second, _ = run_on(device, call, rng_state)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def barriers_needed(device: Device, call: Call, fault: Fault, calls: int) -> list[int]:
    """Which of a kernel's first calls of a barrier or wait can be left out without the emulator noticing."""
    unnoticed = []
    for i in range(calls):
        device.configure(random_seed(), fault, i)
        try:
            run_on(device, call, (0, 0))
        except KernelError:
            continue
        unnoticed.append(i)
    return unnoticed


def test_every_barrier_of_the_simt_kernels_is_needed_and_its_loss_noticed(device: Device) -> None:
    call = draw_call(Case("two_tiles", batch=1, heads=1, kv_heads=1, query_length=64, key_length=100), torch.float32)
    # Call 0 guards buffers that nobody has used before.
    assert barriers_needed(device, call, Fault.SKIP_BLOCK_BARRIER, 8) in ([], [0])
