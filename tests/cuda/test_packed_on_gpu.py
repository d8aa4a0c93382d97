"""On a GPU: packed sequences and paged caches are as accurate as each sequence by itself, forward and backward."""

from __future__ import annotations

import pytest
import torch

from ..cuda_emulation.test_kernels import HALF
from ..varlen_cases import PACKED_CASES, PAGED_CASES, PackedCall, PackedCase, PagedCall, PagedCase
from .test_on_gpu import DTYPES, check_accurate
from .test_on_gpu import pytestmark as needs_gpu

pytestmark = needs_gpu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_packed_sequences(case: PackedCase, dtype: torch.dtype) -> None:
    check_accurate(
        PackedCall.drawn(case, dtype, with_grad_logsumexp=dtype == torch.float32), rounds_weights=dtype in HALF
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_paged_caches(case: PagedCase, dtype: torch.dtype) -> None:
    check_accurate(PagedCall.drawn(case, dtype), rounds_weights=dtype in HALF)
