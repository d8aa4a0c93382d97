"""Paged key/value caches: the keys that a table names, wherever they lie, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_attn
from torch_attn import reference

from ..oracle import assert_kernel_accurate
from ..varlen_cases import PAGED_CASES, PagedCall, PagedCase

ops = torch.ops.torch_attn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DECODE = next(c for c in PAGED_CASES if c.name == "decode")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_error_is_within_a_small_factor_of_torch_math(
    case: PagedCase, dtype: torch.dtype, isa: str, poisoned_memory: None
) -> None:
    assert_kernel_accurate(PagedCall.drawn(case, dtype))


@pytest.mark.parametrize("case", PAGED_CASES, ids=str)
def test_the_composite_path_agrees_with_the_kernels(case: PagedCase) -> None:
    query, key, value, table, lengths = case.tensors(torch.float64)
    key, value = key.nan_to_num().transpose(1, 2), value.nan_to_num().transpose(1, 2)  # it multiplies by 0 instead
    options = case.kwargs(torch.float64) | {"block_table": table, "key_lengths": lengths}
    options["causal_alignment"] = "bottom_right"
    composite = ops.attention_forward.default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd, query, key, value, **options
    )
    torch.testing.assert_close(ops.attention_forward(query, key, value, **options), composite)


def test_a_cache_may_be_a_slice_of_a_larger_one() -> None:
    """vLLM keeps keys and values of a block together: (blocks, 2, block_size, heads, dim)."""
    query, key, value, table, lengths = DECODE.tensors(torch.float32)
    both = torch.stack([key, value], 1)
    actual = torch_attn.paged_attention(query, both[:, 0], both[:, 1], table, lengths, is_causal=True, enable_gqa=True)
    expected = torch_attn.paged_attention(query, key, value, table.long(), lengths, is_causal=True, enable_gqa=True)
    assert torch.equal(actual, expected)


def test_packed_queries_read_pages_as_well() -> None:
    """Chunked prefill: some sequences decode, others read a piece of their prompt."""
    case = PagedCase("mixed", key_lengths=(70, 33, 0, 12), query_length=0)
    _, key, value, table, lengths = case.tensors(torch.float64)
    counts = torch.tensor([1, 20, 0, 12])
    starts = torch.tensor([0, 1, 21, 21, 33], dtype=torch.int32)
    query = torch.randn(33, case.heads, case.head_dim, dtype=torch.float64)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "window_left": 30}
    out, logsumexp = torch_attn.varlen_attention(
        *(query, key, value, starts, None, 20, 0),
        **options,
        key_lengths=lengths,
        block_table=table,
        enable_gqa=True,
        return_logsumexp=True,
    )
    for b, rows in enumerate(torch.arange(33).split(counts.tolist())):
        one = (query[rows].transpose(0, 1)[None], key, value, table[b : b + 1], lengths[b : b + 1])
        expected = reference.paged_attention(*one, **options)
        torch.testing.assert_close(out[rows].transpose(0, 1)[None], expected[0])
        torch.testing.assert_close(logsumexp[:, rows][None], expected[1])


def test_gradients_are_refused_and_no_grad_is_not() -> None:
    query, *rest = DECODE.tensors(torch.float32)
    query.requires_grad_()
    with pytest.raises(RuntimeError, match=r"block_table\) have no derivatives.*torch.no_grad"):
        torch_attn.paged_attention(query, *rest, enable_gqa=True)
    with torch.no_grad():
        assert torch_attn.paged_attention(query, *rest, enable_gqa=True).isfinite().all()


def with_page(table: Tensor, page: int) -> Tensor:
    table = table.clone()
    table[3, 1] = page
    return table


BAD_CALLS = {
    "query_rank": (lambda q, k, v, t, n: (q[0], k, v, t, n), "query must have 4 dimensions"),
    "cache_rank": (lambda q, k, v, t, n: (q, k[0], v, t, n), "key_cache must have 4 dimensions.*block_size"),
    "caches_differ": (lambda q, k, v, t, n: (q, k, v[1:], t, n), "same number of blocks"),
    "page_too_large": (lambda q, k, v, t, n: (q, k, v, with_page(t, 99), n), r"block_table\[3, 1\] is 99"),
    "page_negative": (lambda q, k, v, t, n: (q, k, v, with_page(t, -1), n), r"block_table\[3, 1\] is -1"),
    "table_batch": (lambda q, k, v, t, n: (q, k, v, t[1:], n), r"block_table must have shape.*\(3, 6\)"),
    "table_dtype": (lambda q, k, v, t, n: (q, k, v, t.float(), n), "block_table must be int64 or int32.*float32"),
    "lengths": (lambda q, k, v, t, n: (q, k, v, t, n + 60), r"key_lengths must be between 0 and.*96.*\[0\] is 130"),
    "stride": (lambda q, k, v, t, n: (q, k.mT.contiguous().mT, v, t, n), "key in blocks must have a stride of 1"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_the_error_names_the_argument(name: str) -> None:
    change, message = BAD_CALLS[name]
    with pytest.raises((RuntimeError, ValueError), match=f"(?s){message}"):
        torch_attn.paged_attention(*change(*DECODE.tensors(torch.float32)), enable_gqa=True)


def test_heads_must_match_without_enable_gqa() -> None:
    with pytest.raises(RuntimeError, match="query has 4 heads.*2.*enable_gqa"):
        torch_attn.paged_attention(*DECODE.tensors(torch.float32))


def test_opcheck() -> None:
    inputs = [x.nan_to_num() if x.is_floating_point() else x for x in DECODE.tensors(torch.float32)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    options = {"is_causal": True, "enable_gqa": True}
    torch.library.opcheck(ops.paged_attention_with_logsumexp.default, tuple(inputs), options, test_utils=tests)


def test_torchscript_and_compile_keep_the_operator() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return torch_attn.paged_attention(q, k, v, table, lengths, is_causal=True, enable_gqa=True)

    inputs = DECODE.tensors(torch.float32)
    expected = function(*inputs)
    scripted = torch.jit.script(function)
    assert "torch_attn::paged_attention(" in str(scripted.graph)
    assert torch.equal(scripted(*inputs), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")(*inputs), expected)
