"""Few query rows and a long cache: the split-KV kernels, emulated, with every option, several splits and empty ones."""

from __future__ import annotations

import re

import pytest
import torch

from ..cases import CAUSAL, Case, alibi_per_batch, bool_mask, everything, extreme_mask_rows, float_mask, sinks
from ..oracle import assert_accurate
from .emulation import Device, Run, run_on
from .test_kernels import FULL, HALF, draw_call, random_rng_state, random_seed

BOTTOM_RIGHT = CAUSAL | {"causal_alignment": "bottom_right"}


def short_key_lengths(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An empty cache, one key, one step, and all but one key: most splits are empty."""
    return {"key_lengths": torch.tensor([0, 1, 70, case.key_length - 1])[: case.batch]}


def cache(name: str, **sizes: object) -> Case:
    defaults = {"batch": 1, "heads": 2, "kv_heads": 2, "query_length": 1, "key_length": 530}
    return Case(name, **(defaults | {"head_dim": 64, "value_dim": 64} | sizes))


CASES = [
    cache("one_row"),
    cache("one_row_dim_128", head_dim=128, value_dim=128),
    cache("dim_256_value_200", head_dim=256, value_dim=200),
    cache("dim_40_value_72", head_dim=40, value_dim=72),
    cache("one_group", heads=8, kv_heads=2, key_length=700),
    cache("group_of_three_and_rows", heads=6, query_length=5, options=BOTTOM_RIGHT),
    cache("several_tiles_of_rows", heads=5, kv_heads=1, query_length=7, options=BOTTOM_RIGHT),
    cache("causal_top_left", query_length=3, options=CAUSAL),
    cache("window", query_length=3, key_length=900, options=BOTTOM_RIGHT | {"window_left": 300}),
    cache("key_lengths", batch=4, heads=4, draw=short_key_lengths),
    cache("key_lengths_bottom_right", batch=4, query_length=3, draw=short_key_lengths, options=BOTTOM_RIGHT),
    cache("bool_mask_empty_rows", query_length=4, draw=bool_mask("L", "S", empty_rows=True)),
    cache("float_mask", heads=4, query_length=3, draw=float_mask("B", "H", "L", "S")),
    cache("extreme_mask_rows", query_length=6, draw=extreme_mask_rows),
    cache("alibi", heads=4, query_length=2, draw=alibi_per_batch, options=BOTTOM_RIGHT),
    cache("sinks", heads=4, draw=sinks),
    cache("softcap", options={"softcap": 3.0}),
    cache("dropout", heads=6, query_length=3, options={"dropout_p": 0.3}),
    cache("everything", batch=2, heads=4, query_length=5, draw=everything, options=BOTTOM_RIGHT | FULL),
]
CASE_BY_NAME = {case.name: case for case in CASES}
MULTIPROCESSORS = [3, 108]  # few splits and many


def splits(run: Run) -> int:
    found = re.search(r"keys in (\d+) parts", run.tiers()["sm80"])
    return int(found[1]) if found else 0


def check_case(device: Device, case: Case, dtype: torch.dtype, multiprocessors: int) -> None:
    call = draw_call(case, dtype)
    device.force_tier("sm80")
    device.configure(random_seed(), multiprocessors=multiprocessors)
    assert splits(Run(device, call, (0, 0))) > 0
    assert_accurate(call, *run_on(device, call, random_rng_state()), rounds_weights=True)


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16(case: Case, multiprocessors: int, device: Device) -> None:
    check_case(device, case, torch.bfloat16, multiprocessors)


@pytest.mark.parametrize("name", ["one_row_dim_128", "several_tiles_of_rows", "everything"])
def test_float16(name: str, device: Device) -> None:
    check_case(device, CASE_BY_NAME[name], torch.float16, 108)


def test_logsumexp_of_a_split_call_is_that_of_the_whole(device: Device) -> None:
    """The combination rounds nothing to 16 bits: logsumexp is as exact as float32 sums of float32 scores."""
    call = draw_call(cache("long", key_length=1500), torch.float16)
    device.configure(random_seed())
    run = Run(device, call, (0, 0))
    assert splits(run) > 4
    scores = call.query.double() @ call.key.double().mT / 8.0
    torch.testing.assert_close(run.forward()["logsumexp"].double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


def test_results_do_not_depend_on_the_schedule(device: Device) -> None:
    call, rng_state = draw_call(CASE_BY_NAME["everything"], torch.bfloat16), random_rng_state()
    first = Run(device, call, rng_state).forward()
    for _ in range(3):
        device.configure(random_seed())
        other = Run(device, call, rng_state).forward()
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_call_is_split_only_where_it_gains(dtype: torch.dtype, device: Device) -> None:
    def splits_of(multiprocessors: int = 108, **sizes: int) -> int:
        device.configure(multiprocessors=multiprocessors)
        return splits(Run(device, draw_call(cache("call", **sizes), dtype), (0, 0)))

    assert splits_of(key_length=100) == 0  # nothing to split
    assert splits_of(key_length=2000) == 13  # of 15, 128 keys each: nearly as many places as can be taken
    assert splits_of(key_length=4000, heads=8, kv_heads=8, multiprocessors=16) == 4  # every place is taken
    assert splits_of(query_length=65, head_dim=8, value_dim=8) == 0  # many rows
    assert splits_of(query_length=60, heads=4, kv_heads=4, multiprocessors=2) == 0  # heads enough for all
    assert splits_of(batch=64, head_dim=8, value_dim=8, multiprocessors=1) == 1  # packing alone
