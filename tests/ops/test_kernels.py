"""Each CPU kernel, on each instruction set and in each dtype, is as accurate as torch's math, forward and backward."""

from __future__ import annotations

import pytest
import torch

from ..cases import CASES, Case
from ..oracle import Call, assert_kernel_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw_call(case: Case, dtype: torch.dtype, with_grad_logsumexp: bool) -> Call:
    query, key, value = case.tensors(dtype)
    sizes = (case.batch, case.heads, case.query_length)
    grad_logsumexp = torch.randn(sizes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return Call(
        query,
        key,
        value,
        case.kwargs(dtype),
        torch.randn(*sizes, case.value_dim).to(dtype),
        grad_logsumexp if with_grad_logsumexp else None,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_a_small_factor_of_torch_math(
    case: Case, dtype: torch.dtype, isa: str, poisoned_memory: None
) -> None:
    call = draw_call(case, dtype, with_grad_logsumexp=False)
    assert_kernel_accurate(call)


# torch's own derivative of logsumexp is wrong where that is as large as −1e9, in float64, too.
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "extreme_mask_rows"], ids=str)
def test_logsumexp_carries_a_gradient(case: Case, isa: str, poisoned_memory: None) -> None:
    call = draw_call(case, torch.float32, with_grad_logsumexp=True)
    assert_kernel_accurate(call)
