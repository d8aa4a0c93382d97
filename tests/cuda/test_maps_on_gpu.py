"""On a GPU: attention_statistics and attention_weights equal the float64 map and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torch_attn
from torch_attn.info import explain

from ..cases import CASE_BY_NAME, Case
from ..cuda_emulation.test_kernels import HALF
from ..map_oracle import (
    ASKED,
    DTYPES,
    MAP_CASES,
    STATISTICS,
    Results,
    Rounding,
    assert_within_precision,
    draw,
    dtype_name,
    exact_statistics,
    exact_weights,
    rounding_of_tensor_cores,
    statistics_cotangents,
    weights_cotangent,
    with_gradients,
)
from .test_on_gpu import pytestmark as needs_gpu

pytestmark = needs_gpu


def statistics(query: Tensor, key: Tensor, **options: Any) -> Results:
    found = torch_attn.attention_statistics(query, key, **options, **ASKED, enable_gqa=True)
    return {n: x for n, x in found._asdict().items() if x is not None}


def rounded_by_default(dtype: torch.dtype) -> Rounding | None:
    """16-bit calls take the tensor cores."""
    return rounding_of_tensor_cores(dtype) if dtype in HALF else None


def on_gpu(named: dict[str, Any]) -> dict[str, Any]:
    return {n: x.cuda() if isinstance(x, Tensor) else x for n, x in named.items()}


def to_cpu(results: Results) -> Results:
    return {n: x.cpu() for n, x in results.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_statistics_and_gradients(case: Case, dtype: torch.dtype) -> None:
    query, key, options = draw(case, dtype)
    unstable = () if dtype == torch.float64 else ("max_weight", "top_weights")  # two keys may change places at the top
    wrong = ("logsumexp",) if case.name == "extreme_mask_rows" else ()  # torch's derivative of one of −1e9
    cotangents = statistics_cotangents(query, key, tuple(n for n in STATISTICS if n not in unstable + wrong))
    actual = with_gradients(statistics, query.cuda(), key.cuda(), on_gpu(options), on_gpu(cotangents))
    call = (query, key, options, cotangents)
    assert_within_precision(to_cpu(actual), exact_statistics, dtype, *call, rounded=rounded_by_default(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("part", [{}, {"heads": "mean"}, {"queries": [5, 2, 5, 0]}], ids=["all", "mean", "rows"])
@pytest.mark.parametrize("name", ["causal_long", "grouped_query", "float_mask_over_heads", "everything"])
def test_weights_and_gradients(name: str, part: dict[str, Any], dtype: torch.dtype) -> None:
    query, key, options = draw(CASE_BY_NAME[name], dtype)
    given = weights_cotangent(query, key, part)

    def weights(query: Tensor, key: Tensor, **options: Any) -> Results:
        return {"weights": torch_attn.attention_weights(query, key, **options, **part, enable_gqa=True)}

    actual = with_gradients(weights, query.cuda(), key.cuda(), on_gpu(options), on_gpu(given))
    call = (query, key, options, given)
    assert_within_precision(to_cpu(actual), exact_weights(part), dtype, *call, rounded=rounded_by_default(dtype))


def test_weights_in_tf32(tf32: None) -> None:
    query, key, options = draw(CASE_BY_NAME["causal_long"], torch.float32)
    given = weights_cotangent(query, key, {})

    def weights(query: Tensor, key: Tensor, **options: Any) -> Results:
        return {"weights": torch_attn.attention_weights(query, key, **options)}

    assert explain(query.cuda(), key.cuda(), operation="attention_weights", **on_gpu(options)).tier == "sm80"
    actual = with_gradients(weights, query.cuda(), key.cuda(), on_gpu(options), on_gpu(given))
    call, rounded = (query, key, options, given), rounding_of_tensor_cores(torch.float32)
    assert_within_precision(to_cpu(actual), exact_weights({}), torch.float32, *call, rounded=rounded)
