"""The CUDA kernels, emulated, are as accurate as torch's own math, forward and backward, with every option.

Each test draws its thread schedule as it draws its inputs; the emulator also checks every access for races and bounds.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ..cases import CASE_BY_NAME, CASES, CAUSAL, Case, bool_mask, everything
from ..oracle import Call, assert_accurate
from .emulation import Device, Fault, KernelError, Run, accumulator, run_on

needs_access_reports = pytest.mark.skipif(
    os.environ.get("TORCH_ATTN_EMULATION_CHECK", "races") != "races",
    reason="AddressSanitizer ends the process, and does not look for races",
)
FULL = {"dropout_p": 0.2, "softcap": 4.0}
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


def check_case(device: Device, tier: str, case: Case, dtype: torch.dtype) -> None:
    call = draw_call(case, dtype)
    device.force_tier(tier)
    device.configure(random_seed())
    tf32 = tier == "sm80" and dtype == torch.float32
    results = run_on(device, call, random_rng_state(), allow_tf32=tf32)
    assert_accurate(call, *results, rounds_weights=tier == "sm80", tf32=tf32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_simt_float32(case: Case, device: Device) -> None:
    check_case(device, "simt", case, torch.float32)


# Each code path once more in the other types.
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("name", ["odd_dims", "wide_value", "float_mask_causal", "everything"])
def test_simt_other_types(name: str, dtype: torch.dtype, device: Device) -> None:
    check_case(device, "simt", CASE_BY_NAME[name], dtype)


ANY_SIZE = [
    Case("wider_than_a_block", batch=1, heads=1, kv_heads=1, head_dim=150, value_dim=200),
    Case("head_dim_zero", head_dim=0, options={"scale": 1.0}),
    Case("value_dim_zero", value_dim=0),
    Case("no_keys", key_length=0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ANY_SIZE, ids=str)
def test_simt_serves_any_size(case: Case, dtype: torch.dtype, device: Device) -> None:
    check_case(device, "simt", case, dtype)


SM80_CASES = [case for case in CASES if case.head_dim % 8 == 0 and case.value_dim % 8 == 0]
# Each width that has kernels of its own, plain and full, and widths in between; several tiles of rows and keys.
ONE_HEAD = {"batch": 1, "heads": 1, "kv_heads": 1, "query_length": 150, "key_length": 170}
SM80_WIDTHS = [
    Case("dim_8_value_72", head_dim=8, value_dim=72, **ONE_HEAD),
    Case("dim_128_causal", head_dim=128, value_dim=128, options=CAUSAL, **ONE_HEAD),
    Case("dim_80_value_120_everything", head_dim=80, value_dim=120, draw=everything, options=FULL, **ONE_HEAD),
    Case("dim_192_value_128", head_dim=192, value_dim=128, **ONE_HEAD),
    Case("dim_256_window", head_dim=256, value_dim=256, options={"window_left": 40}, **ONE_HEAD),
    Case("dim_256_masked", head_dim=256, value_dim=200, draw=bool_mask("L", "S"), options=FULL, **ONE_HEAD),
    Case("no_keys", key_length=0),
]


@pytest.mark.parametrize("case", SM80_CASES, ids=str)
def test_sm80_bfloat16(case: Case, device: Device) -> None:
    check_case(device, "sm80", case, torch.bfloat16)


@pytest.mark.parametrize("name", ["causal", "grouped_query_causal", "float_mask_causal", "everything"])
def test_sm80_float16(name: str, device: Device) -> None:
    check_case(device, "sm80", CASE_BY_NAME[name], torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SM80_WIDTHS, ids=str)
def test_sm80_widths(case: Case, dtype: torch.dtype, device: Device) -> None:
    check_case(device, "sm80", case, dtype)


SM90_CASES = [case for case in CASES if case.head_dim % 8 == 0 and case.value_dim % 8 == 0]
SM90_CASES += [case for case in SM80_WIDTHS if max(case.head_dim, case.value_dim) <= 128]
# Some rows' logsumexp is above kLargeLogsumexp. With scores beyond 2^14 binary digits, whose products are rounded to
# 2^-9, a row's largest weight would not always round to 1 in float16, as torch's does.
SM90_CASES += [Case("large_logsumexp", head_dim=64, value_dim=64, options={"scale": 250.0}, **ONE_HEAD)]


def is_served_by_sm90(device: Device, call: Call) -> bool:
    return Run(device, call, (0, 0)).tiers()["sm90"].startswith("+")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SM90_CASES, ids=str)
def test_sm90_forward(case: Case, dtype: torch.dtype, device: Device) -> None:
    call = dataclasses.replace(draw_call(case, dtype, grad_logsumexp=False), grad_out=None)
    # How many multiprocessors there are decides on how many warpgroups share rows.
    device.configure(random_seed(), multiprocessors=2 ** int(torch.randint(8, ())))
    if not is_served_by_sm90(device, call):
        pytest.skip("an option that only full kernels have, or rows few enough for their keys to be split")
    device.force_tier("sm90")
    assert_accurate(call, Run(device, call, (0, 0)).forward(), None, rounds_weights=True)


FUSED = "+one kernel for grad_query, grad_key and grad_value, which adds with atomics"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SM90_CASES, ids=str)
def test_sm90_gradients(case: Case, dtype: torch.dtype, device: Device) -> None:
    call = draw_call(case, dtype)
    device.configure(random_seed(), multiprocessors=int(torch.randint(1, 9, ())))
    run = Run(device, call, (0, 0), deterministic=False)
    results = run.forward() | run.backward()
    if run.backward_tiers["sm90"] != FUSED:
        pytest.skip(run.backward_tiers["sm90"])
    assert_accurate(call, results, None, rounds_weights=True)


TF32_CASES = ["long", "window", "grouped_query_causal", "float_mask_causal", "dropout_causal_grouped", "everything"]
TF32_WIDTHS = [
    Case("dim_4_value_12", head_dim=4, value_dim=12, **ONE_HEAD),
    Case("dim_64", head_dim=64, value_dim=64, **ONE_HEAD),
    Case("dim_64_everything", head_dim=64, value_dim=60, draw=everything, options=FULL, **ONE_HEAD),
    Case("dim_128_causal", head_dim=128, value_dim=128, options=CAUSAL, **ONE_HEAD),
    Case("dim_100_value_72_masked", head_dim=100, value_dim=72, draw=bool_mask("L", "S"), options=FULL, **ONE_HEAD),
]


@pytest.mark.parametrize("case", [*TF32_WIDTHS, *(case for case in CASES if case.name in TF32_CASES)], ids=str)
def test_sm80_tf32(case: Case, device: Device) -> None:
    check_case(device, "sm80", case, torch.float32)


FUSED_CASES = ["plain", "causal_long", "causal_bottom_right", "window", "window_left_of_all_keys", "heads_inside"]
FUSED_CASES += ["grouped_query_causal", "bool_mask_empty_rows", "float_mask", "extreme_mask_rows", "key_lengths"]
FUSED_CASES += ["softcap", "sinks", "dropout_causal_grouped", "negative_scale", "wide_value"]
FUSED_WIDTHS = [
    Case("dim_64", head_dim=64, value_dim=64, **ONE_HEAD),
    Case("dim_128_causal", head_dim=128, value_dim=128, options=CAUSAL, **ONE_HEAD),
    Case("dim_80_value_120_masked", head_dim=80, value_dim=120, draw=bool_mask("L", "S"), options=FULL, **ONE_HEAD),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in FUSED_WIDTHS for dtype in HALF]
    + [(CASE_BY_NAME[name], torch.bfloat16) for name in FUSED_CASES],
    ids=str,
)
def test_sm80_fused_gradients(case: Case, dtype: torch.dtype, device: Device) -> None:
    call, rng_state = draw_call(case, dtype), random_rng_state()
    device.force_tier("sm80")
    device.configure(random_seed(), multiprocessors=1)
    run = Run(device, call, rng_state, deterministic=False)
    results = run.forward() | run.backward()
    assert run.backward_tiers["sm80"] == FUSED
    assert_accurate(call, results, run.keep_mask() if run.problem.dropout_p > 0 else None, rounds_weights=True)


def test_gradients_are_fused_where_it_is_allowed_and_gains(device: Device) -> None:
    def form(dtype: torch.dtype = torch.float16, wanted: list[str] | None = None, **sizes: Any) -> str:
        draw = everything if wanted and "alibi_slopes" in wanted else None
        flags = {"deterministic": sizes.pop("deterministic", False)}
        device.configure(multiprocessors=sizes.pop("multiprocessors", 1))
        run = Run(device, draw_call(Case("call", draw=draw, **sizes), dtype), (0, 0), allow_tf32=True, **flags)
        run.forward()
        run.backward(wanted)
        return run.backward_tiers["sm80"]

    two = "+one kernel for grad_query, one for grad_key and grad_value"
    assert form() == FUSED
    assert form(wanted=["query", "value"]) == FUSED
    assert form(deterministic=True) == two
    assert form(wanted=["query"]) == form(wanted=["key", "value"]) == two  # nothing would be computed twice
    assert form(wanted=["query", "key", "value", "alibi_slopes"]) == two
    assert form(head_dim=136) == two
    assert form(torch.float32) == two + ", products in TF32"
    # Few keys and many rows: 4 blocks in place of 20 and 4.
    assert form(query_length=300, multiprocessors=20) == two


@pytest.mark.parametrize("deterministic", [True, False], ids=["", "atomics"])
@pytest.mark.parametrize("case", [Case("no_batch", batch=0), Case("no_rows", query_length=0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_call_does_nothing(case: Case, dtype: torch.dtype, deterministic: bool, device: Device) -> None:
    run = Run(device, draw_call(case, dtype), (0, 0), deterministic=deterministic)
    results = run.forward() | run.backward()
    for name in ("grad_key", "grad_value"):
        assert not results[name].any()


@pytest.mark.parametrize("tier", ["simt", "sm80"])
@pytest.mark.parametrize(
    "wanted", [["query"], ["key"], ["value"], ["alibi_slopes"], ["key", "attn_mask"]], ids="+".join
)
def test_each_gradient_alone_is_the_same_as_with_the_others(tier: str, wanted: list[str], device: Device) -> None:
    call = draw_call(Case("all", draw=everything, options=FULL, query_length=70, key_length=80), torch.bfloat16)
    device.force_tier(tier)
    run = Run(device, call, (3, 4))
    run.forward()
    every, some = run.backward(), run.backward(wanted)
    assert some.keys() == {f"grad_{name}" for name in wanted}
    for name, value in some.items():
        assert torch.equal(value, every[name])


def test_each_tier_serves_or_says_why_not(device: Device) -> None:
    def sm80(dtype: torch.dtype, allow_tf32: bool = False, **sizes: Any) -> str:
        call = draw_call(Case("call", **sizes), dtype)
        tiers = Run(device, call, (0, 0), allow_tf32=allow_tf32).tiers()
        assert tiers["simt"] == "+one kernel"
        return tiers["sm80"]

    assert sm80(torch.bfloat16) == "+one kernel"
    assert sm80(torch.float32, True) == "+one kernel, products in TF32"
    assert sm80(torch.float64) == "it takes float16, bfloat16 and float32"
    assert "allow_tf32 does not allow" in sm80(torch.float32)
    assert sm80(torch.float16, head_dim=20) == "head_dim and value_dim must be multiples of 8"
    assert sm80(torch.float32, True, value_dim=18) == "head_dim and value_dim must be multiples of 4"
    assert sm80(torch.float16, value_dim=264) == "head_dim and value_dim must be at most 256"
    assert sm80(torch.float32, True, value_dim=132) == "head_dim and value_dim must be at most 128 in TF32"
    shifted = draw_call(Case("call"), torch.float16)
    shifted.key = torch.randn(2, 2, 37, 20).half()[..., 4:]
    assert "multiples of 16 bytes" in Run(device, shifted, (0, 0)).tiers()["sm80"]

    def sm90(dtype: torch.dtype = torch.float16, **sizes: Any) -> str:
        return Run(device, draw_call(Case("call", **sizes), dtype), (0, 0)).tiers()["sm90"]

    assert sm90() == sm90(torch.bfloat16, head_dim=128, value_dim=8) == "+one kernel"
    assert sm90(torch.float32) == "it takes float16 and bfloat16"
    assert sm90(options={"softcap": 3.0}) == "it has no softcap, ALiBi, attn_mask, dropout or paged cache"
    assert sm90(options={"scale": -1.0}) == "scale must be positive"
    assert sm90(value_dim=136) == "head_dim and value_dim must be at most 128"
    assert sm90(head_dim=20) == "head_dim and value_dim must be multiples of 8"
    assert sm90(query_length=2, key_length=900) == "few rows want their keys split"
    assert "multiples of 16 bytes" in Run(device, shifted, (0, 0)).tiers()["sm90"]

    def sm90_backward(wanted: list[str] | None = None, deterministic: bool = False, **sizes: Any) -> str:
        run = Run(device, draw_call(Case("call", **sizes), torch.float16), (0, 0), deterministic=deterministic)
        run.forward()
        run.backward(wanted)
        return run.backward_tiers["sm90"]

    assert sm90_backward() == sm90_backward(["query", "value"]) == FUSED
    assert sm90_backward(options={"softcap": 3.0}).startswith("it has no softcap")
    assert sm90_backward(deterministic=True) == "its gradients are sums of atomics, and deterministic ones are wanted"
    for wanted in (["query"], ["key", "value"]):
        assert sm90_backward(wanted) == "it computes grad_query together with grad_key and grad_value"
    device.force_tier("sm80")
    with pytest.raises(
        KernelError, match="no CUDA kernel can serve this call .*sm80: it takes float16, bfloat16 and float32; simt"
    ):
        run_on(device, draw_call(Case("call"), torch.float64), (0, 0))
    with pytest.raises(KernelError, match="there is no CUDA tier named sm1"):
        device.force_tier("sm1")


def test_dropout_bits_are_those_of_the_cpu_kernels(device: Device) -> None:
    case = CASE_BY_NAME["dropout_causal_grouped"]
    rng_state, p = random_rng_state(), case.options["dropout_p"]
    sizes = (case.batch, case.heads, case.query_length, case.key_length)
    call = draw_call(case, torch.float32)
    for batches in (0, 1):  # 1: every batch entry has the same bits
        expected = torch.ops.torch_attn.dropout_keep_mask(torch.tensor([*rng_state, batches]), *sizes, p)
        assert torch.equal(Run(device, call, rng_state, batches).keep_mask(), expected)


@pytest.mark.parametrize(("tier", "dtype"), [("simt", torch.float32), ("sm80", torch.bfloat16)])
def test_results_do_not_depend_on_the_schedule(tier: str, dtype: torch.dtype, device: Device) -> None:
    call, rng_state = draw_call(CASE_BY_NAME["everything"], dtype), random_rng_state()
    device.force_tier(tier)
    first, _ = run_on(device, call, rng_state)
    for _ in range(3):
        device.configure(random_seed())
        other, _ = run_on(device, call, rng_state)
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@dataclass(frozen=True)
class Kernel:
    """One kernel, in so many steps of its pipeline that buffers are used again, and its barriers that guard nothing."""

    name: str
    tier: str
    run: Callable[[Run], object]
    redundant_block_barriers: frozenset[int] = frozenset()
    redundant_warp_barriers: frozenset[int] = frozenset()
    deterministic: bool = True
    query_length: int = 200
    key_length: int = 200
    head_dim: int = 16
    multiprocessors: int = 1

    def __str__(self) -> str:
        return f"{self.tier}-{self.name}"


def query_gradient(run: Run) -> object:
    return run.backward(["query"])


def key_value_gradient(run: Run) -> object:
    return run.backward(["key", "value"])


FIRST = frozenset({0})
KERNELS = [
    # The first barrier guards buffers that nobody has used before.
    Kernel("forward", "simt", Run.forward, FIRST),
    Kernel("query_gradient", "simt", query_gradient, FIRST),
    # Between its two products, its own barrier comes before the product's.
    Kernel("key_value_gradient", "simt", key_value_gradient, frozenset({0, 9})),
    # Before it stores its output, a block barrier has already ordered the warp.
    Kernel("forward", "sm80", Run.forward, redundant_warp_barriers=FIRST),
    Kernel("decode", "sm80", Run.forward, query_length=3, key_length=800),
    Kernel("query_gradient", "sm80", query_gradient),
    Kernel("forward", "sm90", Run.forward, query_length=256, key_length=1200),
    Kernel("short_forward", "sm90", Run.forward, redundant_warp_barriers=FIRST, key_length=500),
    # The third is a turn, which only makes it faster. What a warp's second tells the copying warps of keys, values tell
    # them soon enough.
    Kernel(
        "forward_in_parts",
        "sm90",
        Run.forward,
        redundant_block_barriers=frozenset({2}),
        redundant_warp_barriers=frozenset({1}),
        query_length=100,
        key_length=1200,
        head_dim=128,
        multiprocessors=4,
    ),
    Kernel("key_value_gradient", "sm80", key_value_gradient),
    Kernel("all_gradients", "sm90", Run.backward, deterministic=False, query_length=500),
    Kernel("all_gradients", "sm80", Run.backward, redundant_warp_barriers=FIRST, deterministic=False),
]
BARRIERS = {
    "simt": 10,
    "sm80": 3,
    "sm90": 3,
}  # how many are tried: in simt's two products, and in one step and the next


def unnoticed(device: Device, run: Run, kernel: Kernel, fault: Fault, calls: int) -> frozenset[int]:
    """Which of the first calls of a barrier or a wait a kernel can lose without the emulator noticing."""
    lost = []
    for i in range(calls):
        device.configure(random_seed(), fault, i, kernel.multiprocessors)
        try:
            kernel.run(run)
        except KernelError:
            continue
        lost.append(i)
    return frozenset(lost)


@needs_access_reports
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_loss_of_any_barrier_or_wait_is_noticed(kernel: Kernel, device: Device) -> None:
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "query_length": kernel.query_length}
    case = Case(
        "several_steps",
        **sizes,
        key_length=kernel.key_length,
        head_dim=kernel.head_dim,
        value_dim=kernel.head_dim,
    )
    device.force_tier(kernel.tier)
    device.configure(multiprocessors=kernel.multiprocessors)
    dtype = torch.float32 if kernel.tier == "simt" else torch.bfloat16
    run = Run(device, draw_call(case, dtype), (0, 0), deterministic=kernel.deterministic)
    run.forward()
    calls = BARRIERS[kernel.tier]
    assert unnoticed(device, run, kernel, Fault.SKIP_BLOCK_BARRIER, calls) == kernel.redundant_block_barriers
    if kernel.tier != "simt":
        assert unnoticed(device, run, kernel, Fault.SKIP_COPY_WAIT, calls) == frozenset()
        assert unnoticed(device, run, kernel, Fault.SKIP_WARP_BARRIER, 2) == kernel.redundant_warp_barriers


def several_steps(device: Device, head_dim: int, query_length: int = 500, key_length: int = 300) -> Run:
    """On sm90: by default more steps of the backward pass than there are buffers."""
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "query_length": query_length, "key_length": key_length}
    case = Case("several_steps", head_dim=head_dim, value_dim=head_dim, **sizes)
    device.force_tier("sm90")
    return Run(device, draw_call(case, torch.bfloat16), (0, 0), deterministic=False)


OUT_OF_STEP = [Fault.SKIP_PRODUCT_WAIT, Fault.WRONG_PHASE, Fault.EARLY_RELEASE]


@needs_access_reports
@pytest.mark.parametrize("fault", OUT_OF_STEP)
@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize(("head_dim", "query_length", "multiprocessors"), [(64, 500, 1), (128, 500, 1), (128, 100, 4)])
def test_outputs_out_of_step_show(
    head_dim: int, query_length: int, multiprocessors: int, call: int, fault: Fault, device: Device
) -> None:
    """Products that are not waited for, which are computed as late as they may be, and mbarriers whose other phase is
    waited for or that are passed on early: the result is wrong, or operands have been written to. Where there are many
    multiprocessors, warpgroups share rows."""
    device.configure(multiprocessors=multiprocessors)
    check_out_of_step(several_steps(device, head_dim, query_length, 1200), call, fault, device, multiprocessors)


@needs_access_reports
@pytest.mark.parametrize("call", range(4))
def test_products_that_short_calls_do_not_wait_for_show(call: int, device: Device) -> None:
    check_out_of_step(several_steps(device, 64, query_length=100), call, Fault.SKIP_PRODUCT_WAIT, device, 1)


def check_out_of_step(run: Run, call: int, fault: Fault, device: Device, multiprocessors: int) -> None:
    right = run.forward()["out"]
    device.configure(random_seed(), fault, call, multiprocessors)
    try:
        assert not torch.equal(run.forward()["out"], right)
    except KernelError:
        pass


@needs_access_reports
@pytest.mark.parametrize("fault", OUT_OF_STEP)
@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_out_of_step_show(head_dim: int, call: int, fault: Fault, device: Device) -> None:
    """Products that are not waited for, and mbarriers whose other phase is waited for or that are passed on early."""
    run = several_steps(device, head_dim)
    run.forward()
    right = run.backward()
    device.configure(random_seed(), fault, call)
    try:
        wrong = run.backward()
    except KernelError:
        return
    assert any(not torch.allclose(wrong[name].float(), x.float(), rtol=0.1, atol=0.1) for name, x in right.items())
