"""On a GPU: every case of the CPU tests, gradients by finite differences, and dropout under CUDA-graph capture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torch_attn.info import explain

from ..cases import CASE_BY_NAME, CASES, CAUSAL, Case, small
from ..cuda_emulation.test_decode import CASES as DECODE_CASES
from ..cuda_emulation.test_kernels import HALF, TF32_WIDTHS, draw_call
from ..oracle import Call, assert_accurate, run_kernel

pytestmark = pytest.mark.skipif(
    not (
        torch.cuda.is_available()
        and torch._C._dispatch_has_kernel_for_dispatch_key("torch_attn::attention_forward", "CUDA")
    ),
    reason="needs a GPU, a CUDA build of torch and CUDA kernels in the library",
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def on_gpu(call: Call) -> Call:
    return call.mapped(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x)


def check_accurate(call: Call, *, rounds_weights: bool = False, tf32: bool = False) -> None:
    """Runs the call on the GPU; what it is compared with is computed on the CPU."""
    actual, keep = run_kernel(on_gpu(call))
    keep = None if keep is None else keep.cpu()
    assert_accurate(call, {name: x.cpu() for name, x in actual.items()}, keep, rounds_weights=rounds_weights, tf32=tf32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_a_small_factor_of_torch_math(case: Case, dtype: torch.dtype) -> None:
    check_accurate(draw_call(case, dtype), rounds_weights=dtype in HALF)


@pytest.mark.parametrize("case", [*TF32_WIDTHS, CASE_BY_NAME["causal_long"], CASE_BY_NAME["everything"]], ids=str)
def test_tf32_error_is_within_a_small_factor_of_torch_math_in_tf32(case: Case, tf32: None) -> None:
    check_accurate(draw_call(case, torch.float32), rounds_weights=True, tf32=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decoding_error_is_within_a_small_factor_of_torch_math(case: Case, dtype: torch.dtype) -> None:
    check_accurate(draw_call(case, dtype), rounds_weights=dtype in HALF)


@pytest.mark.parametrize(
    "options", [{}, CAUSAL, {"window_left": 150, "window_right": 70}], ids=["full", "causal", "window"]
)
@pytest.mark.parametrize("head_dim", [64, 120, 128])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_with_atomics_are_as_accurate_as_without(
    dtype: torch.dtype, head_dim: int, options: dict[str, Any]
) -> None:
    """Blocks enough for the kernel that adds with atomics to be chosen; explain says that it was."""
    sizes = {"batch": 8, "heads": 8, "kv_heads": 4, "query_length": 700, "key_length": 650}
    case = Case("many_blocks", **sizes, head_dim=head_dim, value_dim=head_dim, options=options)
    call = draw_call(case, dtype, grad_logsumexp=False)
    gpu = on_gpu(call)
    explanation = explain(gpu.query, gpu.key, gpu.value, backward=True, **gpu.options)
    assert "adds with atomics" in str(explanation)
    assert explanation.tier == ("sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80")
    check_accurate(call, rounds_weights=True)


def test_gradients_are_the_same_in_every_run_where_that_is_asked(deterministic: None) -> None:
    query = torch.randn(4, 16, 1000, 64, device="cuda", dtype=torch.float16, requires_grad=True)

    def gradient() -> torch.Tensor:
        out = torch.ops.torch_attn.attention_forward(query, query, query, is_causal=True)[0]
        return torch.autograd.grad(out.float().square().sum(), query)[0]

    first = gradient()
    for _ in range(5):
        assert torch.equal(gradient(), first)


@pytest.mark.parametrize("name", ["plain", "float_mask_causal", "alibi", "softcap", "sinks", "grouped_query"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    call = on_gpu(draw_call(small(CASE_BY_NAME[name]), torch.float64))
    tensors = [x.requires_grad_() for x in (call.query, call.key, call.value)]

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.torch_attn.attention_forward(query, key, value, **call.options)[:2]

    assert torch.autograd.gradcheck(attention, tensors)


def test_a_replayed_graph_draws_new_dropout_bits() -> None:
    query = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16)
    value = torch.ones_like(query)

    def attention() -> torch.Tensor:
        return torch.ops.torch_attn.attention_forward(query, query, value, dropout_p=0.5)[0]

    attention()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention()
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)
