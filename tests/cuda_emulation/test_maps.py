"""The CUDA kernels of attention maps, emulated, equal the float64 map and its autograd gradients, with every option.

Each test draws its thread schedule as it draws its inputs; the emulator also checks every access for races and bounds.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torch_attn import reference

from ..cases import CASE_BY_NAME, CAUSAL, Case
from ..map_oracle import (
    ASKED,
    DTYPES,
    MAP_CASES,
    STATISTICS,
    Results,
    assert_keys_hold_the_largest_weights,
    assert_within_precision,
    draw,
    dtype_name,
    exact_statistics,
    exact_weights,
    in_float64,
    statistics_cotangents,
    weights_cotangent,
)
from .emulation import Device
from .maps import MapRun
from .test_kernels import random_seed


def check_statistics(device: Device, case: Case, dtype: torch.dtype, names: tuple[str, ...] = STATISTICS) -> None:
    """names: the statistics whose gradients are passed back, all at once."""
    query, key, options = draw(case, dtype)
    device.configure(random_seed())
    run = MapRun(device, query, key, options)
    gradients = statistics_cotangents(query, key, names)
    actual = {n: x.clone() for n, x in run.statistics(**ASKED).items()}
    if names:
        actual |= run.statistics_backward(gradients)
    assert_within_precision(actual, exact_statistics, dtype, query, key, options, gradients)
    if case.name != "extreme_mask_rows" or dtype == torch.float64:  # where float32 rounds all scores to one
        assert_keys_hold_the_largest_weights(actual, reference.attention_weights(*in_float64(query, key), **options))


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_statistics_and_gradients_equal_float64_autograd(case: Case, device: Device) -> None:
    # torch's derivative of a logsumexp of −1e9 is wrong.
    names = tuple(n for n in STATISTICS if n != "logsumexp" or case.name != "extreme_mask_rows")
    check_statistics(device, case, torch.float64, names)


EVERY_DTYPE = ["causal_long", "grouped_query", "float_mask_over_heads", "everything"]
LOW = [x for x in DTYPES if x != torch.float64]


@pytest.mark.parametrize("dtype", LOW, ids=dtype_name)
@pytest.mark.parametrize("name", [*EVERY_DTYPE, "odd_dims", "extreme_mask_rows"])
def test_statistics_of_every_dtype(name: str, dtype: torch.dtype, device: Device) -> None:
    unstable = ("max_weight", "top_weights")  # two keys may change places at the top
    names = tuple(n for n in STATISTICS if n not in unstable) if name in EVERY_DTYPE else ()
    check_statistics(device, CASE_BY_NAME[name], dtype, names)


@pytest.mark.parametrize("name", STATISTICS)
def test_each_gradient_alone_equals_float64_autograd(name: str, device: Device) -> None:
    check_statistics(device, CASE_BY_NAME["everything"], torch.float64, (name,))


def check_weights(
    device: Device, case: Case, dtype: torch.dtype, mean: bool, rows: Tensor | None = None, backward: bool = True
) -> None:
    query, key, options = draw(case, dtype)
    device.configure(random_seed())
    part = ({"heads": "mean"} if mean else {}) | ({} if rows is None else {"queries": rows})
    given = weights_cotangent(query, key, part) if backward else {}
    run = MapRun(device, query, key, options, rows)
    actual: Results = {"weights": run.weights(mean)}
    if backward:
        actual |= run.weights_backward(given["weights"], mean)
    if rows is not None:  # what the ops layer gathered passes its gradient back
        for name, length in (("grad_query", query.size(2)), ("grad_attn_mask", case.query_length)):
            if name in actual and actual[name].size(2) == len(rows):
                whole = torch.zeros(*actual[name].shape[:2], length, actual[name].size(3), dtype=actual[name].dtype)
                actual[name] = whole.index_add(2, rows, actual[name])
    assert_within_precision(actual, exact_weights(part), dtype, query, key, options, given)


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_weights_and_gradients_equal_float64_autograd(case: Case, device: Device) -> None:
    check_weights(device, case, torch.float64, mean=False)


@pytest.mark.parametrize("dtype", LOW, ids=dtype_name)
@pytest.mark.parametrize("mean", [False, True], ids=["all", "mean"])
@pytest.mark.parametrize("name", EVERY_DTYPE)
def test_weights_of_every_dtype(name: str, mean: bool, dtype: torch.dtype, device: Device) -> None:
    check_weights(device, CASE_BY_NAME[name], dtype, mean)


@pytest.mark.parametrize("dtype", LOW, ids=dtype_name)
@pytest.mark.parametrize("name", ["odd_dims", "extreme_mask_rows"])
def test_weights_survive_odd_sizes_and_a_large_logsumexp(name: str, dtype: torch.dtype, device: Device) -> None:
    check_weights(device, CASE_BY_NAME[name], dtype, mean=False, backward=False)


ANY_ROWS = ["plain", "causal_long", "causal_bottom_right", "window", "grouped_query", "float_mask", "everything"]


@pytest.mark.parametrize("mean", [False, True], ids=["all", "mean"])
@pytest.mark.parametrize("name", ANY_ROWS)
def test_rows_in_any_order(name: str, mean: bool, device: Device) -> None:
    """With rows that come twice, and more than one tile of them."""
    case = CASE_BY_NAME[name]
    rows = torch.randint(0, case.query_length, (77,))
    check_weights(device, case, torch.float64, mean, rows)


WIDE = [
    Case("wider_than_a_block", batch=1, heads=1, kv_heads=1, head_dim=150),
    Case("head_dim_zero", head_dim=0, options={"scale": 1.0}),
    Case("several_tiles", batch=1, heads=2, kv_heads=1, query_length=130, key_length=150, options=CAUSAL),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_any_size(case: Case, device: Device) -> None:
    check_statistics(device, case, torch.float64)
    check_weights(device, case, torch.float64, mean=False)


def test_no_keys(device: Device) -> None:
    query, key, options = draw(Case("no_keys", key_length=0, options=CAUSAL), torch.float32)
    found = MapRun(device, query, key, options).statistics(**ASKED)
    assert (found["logsumexp"] == -math.inf).all()
    assert (found["argmax"] == -1).all() and (found["top_indices"] == -1).all()
    for name in STATISTICS[1:]:
        assert (found[name] == 0).all(), name


@pytest.mark.parametrize("top_k", [1, 17, 64, 200])
def test_top_k_is_torchs(top_k: int, device: Device) -> None:
    query, key = torch.randn(1, 2, 70, 8, dtype=torch.float64), torch.randn(1, 2, 150, 8, dtype=torch.float64)
    found = MapRun(device, query, key, {}).statistics(top_k=top_k, column_sum=False)
    count = min(top_k, 150)
    values, indices = reference.attention_weights(query, key).sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found["top_weights"][..., :count], values[..., :count])
    assert torch.equal(found["top_indices"][..., :count], indices[..., :count])
    assert (found["top_indices"][..., count:] == -1).all() and (found["top_weights"][..., count:] == 0).all()


def test_equal_scores_are_ranked_by_their_keys_number(device: Device) -> None:
    query, key = torch.ones(1, 1, 70, 3), torch.zeros(1, 1, 300, 3)
    key[:, :, [7, 130, 201, 202]] = 1.0
    found = MapRun(device, query, key, {}).statistics(top_k=6)
    assert (found["argmax"] == 7).all()
    assert (found["top_indices"] == torch.tensor([7, 130, 201, 202, 0, 1])).all()


def test_results_do_not_depend_on_the_schedule(device: Device) -> None:
    query, key, options = draw(CASE_BY_NAME["everything"], torch.float32)
    gradients = statistics_cotangents(query, key, STATISTICS)
    first: Results = {}
    for _ in range(2):
        device.configure(random_seed())
        run = MapRun(device, query, key, options)
        found = {n: x.clone() for n, x in run.statistics(**ASKED).items()} | run.statistics_backward(gradients)
        first = first or found
        assert all(torch.equal(x, found[n]) for n, x in first.items())
