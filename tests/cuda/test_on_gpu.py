"""On a GPU: every case of the CPU tests, gradients by finite differences, and dropout under CUDA-graph capture."""

from __future__ import annotations

import pytest
import torch

from ..cases import CASE_BY_NAME, CASES, Case, small
from ..cuda_emulation.test_kernels import assert_accurate, draw_call
from ..oracle import Call, run_kernel

pytestmark = pytest.mark.skipif(
    not (
        torch.cuda.is_available()
        and torch._C._dispatch_has_kernel_for_dispatch_key("torch_attn::attention_forward", "CUDA")
    ),
    reason="needs a GPU, a CUDA build of torch and CUDA kernels in the library",
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def on_gpu(call: Call) -> Call:
    def move(x: object) -> object:
        return x.cuda() if isinstance(x, torch.Tensor) else x

    options = {name: move(x) for name, x in call.options.items()}
    tensors = [move(x) for x in (call.query, call.key, call.value)]
    return Call(*tensors, options, move(call.grad_out), move(call.grad_logsumexp))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_within_a_small_factor_of_torch_math(case: Case, dtype: torch.dtype) -> None:
    call = draw_call(case, dtype)
    actual, keep = run_kernel(on_gpu(call))
    assert_accurate(call, {name: x.cpu() for name, x in actual.items()}, None if keep is None else keep.cpu())


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
