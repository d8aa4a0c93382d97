"""Hard attention's CUDA kernels, emulated: the same choices as the CPU's, judged as they are (../selection_oracle.py).

The emulator checks every access for races and bounds; each test draws its thread schedule as it draws its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_attn import reference

from ..cases import CASE_BY_NAME, CAUSAL, Case
from ..selection_oracle import (
    RULES,
    WITHOUT_DROPOUT,
    assert_gradients,
    assert_selected,
    gradient_weights,
    inputs_of,
    noise_of,
)
from .emulation import Device, Fault, KernelError, accumulator
from .selection import ChosenRows, SelectionRun
from .test_kernels import ANY_SIZE, HALF, needs_access_reports, random_seed

ops = torch.ops.torch_attn
OTHER_TYPES = [torch.float64, *HALF]


def random_state(batches: int = 0) -> Tensor:
    return torch.tensor([int(torch.randint(2**62, ())), int(torch.randint(2**33, ())), batches])


def check_case(device: Device, case: Case, dtype: torch.dtype, rules: Iterable[str] = RULES) -> None:
    """Forward by each rule, and the gradients of the draw with replacement."""
    inputs = inputs_of(case, dtype)
    device.configure(random_seed())
    device.force_tier("simt")
    for name in rules:
        rule, state = RULES[name], random_state()
        run = SelectionRun(device, inputs, state)
        results = run.forward(**rule)
        assert_selected(case, inputs, rule, results, noise_of(inputs, rule, state))
        if name != "with_replacement" or (case.name == "extreme_mask_rows" and dtype != torch.float64):
            continue
        weights = gradient_weights(case, list(results[1:]))
        assert_gradients(case, inputs, results[0], weights, run.backward(weights))


@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
def test_float32(case: Case, device: Device) -> None:
    every_rule = case.name in ("plain", "causal_more_keys", "key_lengths", "sinks", "extreme_mask_rows", "everything")
    check_case(device, case, torch.float32, RULES if every_rule else ["with_replacement"])


@pytest.mark.parametrize("dtype", OTHER_TYPES, ids=str)
@pytest.mark.parametrize("name", ["odd_dims", "float_mask_causal", "extreme_mask_rows", "everything"])
def test_other_types(name: str, dtype: torch.dtype, device: Device) -> None:
    check_case(device, CASE_BY_NAME[name], dtype)


SM80_CASES = [case for case in WITHOUT_DROPOUT if case.head_dim % 8 == 0 and "long" not in case.name]
SM80_WIDTHS = [
    Case("dim_128_causal", head_dim=128, options=CAUSAL, query_length=130, key_length=150),
    Case("dim_72", head_dim=72, query_length=20, key_length=150),
]


@pytest.mark.parametrize("case", [*SM80_CASES, *SM80_WIDTHS], ids=str)
def test_sm80_bfloat16(case: Case, device: Device) -> None:
    check_sm80(device, case, torch.bfloat16)


@pytest.mark.parametrize("name", ["causal", "grouped_query_causal", "everything"])
def test_sm80_float16(name: str, device: Device) -> None:
    check_sm80(device, CASE_BY_NAME[name], torch.float16)


def check_sm80(device: Device, case: Case, dtype: torch.dtype) -> None:
    """Forward; the backward pass is simt's. ``everything`` goes through every rule, the others one drawn at random."""
    inputs, state = inputs_of(case, dtype), random_state()
    device.configure(random_seed())
    device.force_tier("sm80")
    names = list(RULES)
    for rule in RULES.values() if case.name == "everything" else [RULES[names[int(torch.randint(3, ()))]]]:
        results = SelectionRun(device, inputs, state).forward(**rule)
        assert_selected(case, inputs, rule, results, noise_of(inputs, rule, state))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_tier_serves_or_says_why_not(rule: dict[str, Any], device: Device) -> None:
    for dtype, head_dim, reason in [
        (torch.float32, 16, "it takes float16 and bfloat16"),
        (torch.float16, 20, "head_dim must be a multiple of 8, at most 128"),
        (torch.float16, 136, "head_dim must be a multiple of 8, at most 128"),
    ]:
        inputs = inputs_of(Case("call", query_length=3, head_dim=head_dim), dtype)
        device.force_tier("sm80")
        with pytest.raises(KernelError, match="no CUDA kernel can serve this call .*sm80: " + reason):
            SelectionRun(device, inputs, random_state()).forward(**rule)
        device.force_tier("")
        SelectionRun(device, inputs, random_state()).forward(**rule)


@pytest.mark.parametrize("case", [case for case in ANY_SIZE if case.name not in ("value_dim_zero", "no_keys")], ids=str)
def test_any_size(case: Case, device: Device) -> None:
    check_case(device, case, torch.float32)


@pytest.mark.parametrize("name", ["plain", "causal_more_keys", "window", "bool_mask_empty_rows", "everything"])
@pytest.mark.parametrize("batches", [0, 1])
def test_the_choices_are_the_cpu_kernels(name: str, batches: int, device: Device) -> None:
    inputs = inputs_of(CASE_BY_NAME[name], torch.float64)
    for rule in RULES.values():
        state = random_state(batches)
        expected = ops.select_keys(**inputs, **rule, rng_state=state)[:-1]
        actual = SelectionRun(device, inputs, state).forward(**rule)
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual, expected)


def test_a_chosen_sink_is_no_key_of_a_mask_that_is_broadcast_over_keys(device: Device) -> None:
    case = CASE_BY_NAME["float_mask_over_keys"]
    inputs = inputs_of(case, torch.float64) | {"sinks": torch.full((case.heads,), 3.0, dtype=torch.float64)}
    run = SelectionRun(device, inputs, random_state())
    results = run.forward(3, sample=True, replacement=True)
    assert (results[0] == case.key_length).any()
    weights = gradient_weights(case, list(results[1:]))
    assert_gradients(case, inputs, results[0], weights, run.backward(weights))


def test_of_equal_scores_the_lowest_index_comes_first(device: Device) -> None:
    """Small integers: every score is exact, and most are shared by many keys."""
    query, key = (torch.randint(-1, 2, (1, 2, n, 4)).float() for n in (70, 200))
    inputs: dict[str, Any] = {"query": query, "key": key, "scale": 1.0}
    logits = reference.logits(query.double(), key.double(), scale=1.0)
    for count in (1, 2, 7, 40):
        indices = SelectionRun(device, inputs, random_state()).forward(count)[0]
        assert torch.equal(indices, reference.choose_keys(logits, count))


def test_more_choices_than_keys_and_than_threads_of_a_row(device: Device) -> None:
    case = Case("few_keys", batch=1, heads=1, kv_heads=1, query_length=5, key_length=20)
    inputs = inputs_of(case, torch.float64)
    for rule in RULES.values():
        wider, state = {**rule, "count": 30}, random_state()
        results = SelectionRun(device, inputs, state).forward(**wider)
        assert_selected(case, inputs, wider, results, noise_of(inputs, wider, state))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_nan_shows_and_no_index_leaves_the_keys(rule: dict[str, Any], device: Device) -> None:
    query, key = torch.randn(1, 1, 70, 8), torch.randn(1, 1, 70, 8)
    query[0, 0, 40, 3] = torch.nan
    inputs: dict[str, Any] = {"query": query, "key": key, "is_causal": True}
    indices, _, log_prob, entropy, _ = SelectionRun(device, inputs, random_state()).forward(**rule)
    assert ((indices >= -1) & (indices < 70)).all()
    rows = torch.arange(70) == 40
    assert torch.equal(entropy.isnan().flatten(), rows)
    assert not log_prob[0, 0, ~rows].isnan().any()


@pytest.mark.parametrize("wanted", ["query", "key", "attn_mask", "alibi_slopes"])
def test_each_gradient_alone_is_the_same_as_with_the_others(wanted: str, device: Device) -> None:
    inputs = inputs_of(CASE_BY_NAME["everything"], torch.float32)
    run = SelectionRun(device, inputs, random_state())
    results = run.forward(2, sample=True)
    weights: list[Tensor | None] = [torch.randn_like(x) for x in results[1:]]
    every, alone = run.backward(weights), run.backward(weights, [wanted])
    assert list(alone) == [wanted]
    assert torch.equal(alone[wanted], every[wanted])


def test_each_output_alone_passes_its_gradient(device: Device) -> None:
    case = CASE_BY_NAME["softcap"]
    inputs = inputs_of(case, torch.float64)
    run = SelectionRun(device, inputs, random_state())
    results = run.forward(3, sample=True, replacement=True)
    for i in range(4):
        weights: list[Any] = [None] * 4
        weights[i] = torch.randn_like(results[1 + i])
        assert_gradients(case, inputs, results[0], weights, run.backward(weights))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_results_do_not_depend_on_the_schedule(rule: dict[str, Any], device: Device) -> None:
    inputs, state = inputs_of(CASE_BY_NAME["everything"], torch.float32), random_state()
    outcomes = []
    for _ in range(2):
        run = SelectionRun(device, inputs, state)
        results = run.forward(**rule)
        outcomes.append([*results, *run.backward([torch.ones_like(x) for x in results[1:]]).values()])
        device.configure(random_seed())
    for first, second in zip(*outcomes, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, *OTHER_TYPES], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("sizes", [(2, 4, 2, 37, 3, 90, 70), (1, 1, 1, 300, 1, 10, 5), (1, 2, 1, 3, 2, 1, 1)], ids=str)
def test_rows_are_gathered_scattered_and_multiplied(
    sizes: tuple[int, ...], weighted: bool, dtype: torch.dtype, device: Device
) -> None:
    batch, heads, kv_heads, length, count, source_length, columns = sizes
    source = torch.randn(batch, source_length, kv_heads, columns).to(dtype).transpose(1, 2)
    rows = torch.randn(batch, heads, length, columns).to(dtype)
    indices = torch.randint(-1, source_length + 1, (batch, heads, length, count))  # the ends are no rows
    weights = torch.randn(indices.shape, dtype=accumulator(dtype)) if weighted else None
    device.configure(random_seed())
    kernels = ChosenRows(device, source, indices, weights)
    expected = ops.gather_values(source, indices, weights)
    grad_source, grad_weights = ops.gather_values_backward(rows, source, indices, weights, [True, weighted])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    compare = {"rtol": tolerance, "atol": tolerance * (1 + length * count / source_length) ** 0.5}
    torch.testing.assert_close(kernels.gather(), expected, **compare)
    torch.testing.assert_close(kernels.scatter(rows), grad_source, **compare)
    if weighted:
        torch.testing.assert_close(kernels.dots(rows), grad_weights, **compare)


@pytest.mark.parametrize("case", [Case("no_batch", batch=0), Case("no_rows", query_length=0)], ids=str)
def test_an_empty_call_does_nothing(case: Case, device: Device) -> None:
    inputs = inputs_of(case, torch.float32)
    run = SelectionRun(device, inputs, random_state())
    results = run.forward(2)
    grads = run.backward([torch.ones_like(x) for x in results[1:]])
    assert not grads["key"].any()


# Of each kind, the calls whose loss must be noticed; the first block barrier of simt guards unused memory.
FAULTS = [
    ("simt", torch.float32, Fault.SKIP_WARP_BARRIER, range(3)),
    ("simt", torch.float32, Fault.SKIP_BLOCK_BARRIER, range(1, 5)),
    ("sm80", torch.bfloat16, Fault.SKIP_WARP_BARRIER, range(3)),
    ("sm80", torch.bfloat16, Fault.SKIP_BLOCK_BARRIER, range(4)),
    ("sm80", torch.bfloat16, Fault.SKIP_COPY_WAIT, range(3)),
]


@needs_access_reports
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("tier", "dtype", "fault", "calls"), FAULTS, ids=lambda x: str(x).removeprefix("Fault."))
def test_the_loss_of_any_barrier_or_wait_is_noticed(
    tier: str, dtype: torch.dtype, fault: Fault, calls: range, rule: dict[str, Any], device: Device
) -> None:
    case = Case("several_steps", batch=1, heads=1, kv_heads=1, query_length=70, key_length=200)
    device.force_tier(tier)
    run = SelectionRun(device, inputs_of(case, dtype), random_state())
    for call in calls:
        device.configure(random_seed(), fault, call)
        with pytest.raises(KernelError):
            run.forward(**rule)


@needs_access_reports
@pytest.mark.parametrize("call", range(1, 6))
def test_the_loss_of_a_block_barrier_is_noticed_in_the_backward_pass(call: int, device: Device) -> None:
    case = Case("several_steps", batch=1, heads=1, kv_heads=1, query_length=130, key_length=200)
    run = SelectionRun(device, inputs_of(case, torch.float32), random_state())
    results = run.forward(2, sample=True)
    device.configure(random_seed(), Fault.SKIP_BLOCK_BARRIER, call)  # the first guards what nobody has used before
    with pytest.raises(KernelError):
        run.backward([torch.ones_like(x) for x in results[1:]], ["query"])
    device.configure(random_seed(), Fault.SKIP_BLOCK_BARRIER, call)
    with pytest.raises(KernelError):
        run.backward([torch.ones_like(x) for x in results[1:]], ["key"])
