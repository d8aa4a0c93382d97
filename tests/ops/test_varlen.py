"""Packed sequences: as accurate as each sequence by itself, with every derivative, and refused where they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import torch_attn
from torch_attn import reference

from ..oracle import DIFFERENTIABLE_OPTIONS, assert_kernel_accurate
from ..varlen_cases import PACKED_BY_NAME, PACKED_CASES, PackedCall, PackedCase, small

ops = torch.ops.torch_attn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", PACKED_CASES, ids=str)
def test_error_is_within_a_small_factor_of_torch_math(
    case: PackedCase, dtype: torch.dtype, isa: str, poisoned_memory: None
) -> None:
    assert_kernel_accurate(PackedCall.drawn(case, dtype, with_grad_logsumexp=dtype == torch.float32))


@pytest.mark.parametrize("threads", [1, 3])
def test_long_and_short_sequences_share_the_threads(threads: int) -> None:
    lengths = (3, 150, 8, 1, 0, 20, 9, 4, 11, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_kernel_accurate(PackedCall.drawn(PackedCase("ragged", query_lengths=lengths), torch.float32))
    finally:
        torch.set_num_threads(before)


def as_function(case: PackedCase) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """The case as a function of its differentiable tensors; logsumexp's −inf rows, which have no gradient, read 0."""
    options: dict[str, Any] = case.kwargs(torch.float64) | {"enable_gqa": True}
    tensors = dict(zip(("query", "key", "value"), case.tensors(torch.float64), strict=True))
    tensors |= {name: options.pop(name) for name in DIFFERENTIABLE_OPTIONS if name in options}
    starts = case.places()

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        if "dropout_p" in options:
            torch.manual_seed(17)  # the same bits at every evaluation
        named = dict(zip(tensors, args, strict=True))
        out, logsumexp = ops.varlen_attention_with_logsumexp(**named, **options, **starts)
        return out, logsumexp.masked_fill(logsumexp.isinf(), 0.0)

    return function, tuple(x.requires_grad_() for x in tensors.values())


DERIVED = [
    small(PACKED_BY_NAME[name]) for name in ("more_keys_bottom_right", "alibi_of_sequences", "tail", "everything")
]


@pytest.mark.parametrize("case", DERIVED, ids=str)
def test_gradcheck_backward_and_forward_mode(case: PackedCase) -> None:
    function, inputs = as_function(case)
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("case", DERIVED, ids=str)
def test_gradgradcheck(case: PackedCase) -> None:
    function, inputs = as_function(case)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def composite(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as devices without kernels of their own run it."""
    return lambda *args, **options: getattr(ops, name).default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd, *args, **options
    )


@pytest.mark.parametrize("name", ["causal", "used_keys", "alibi_of_sequences", "everything"])
def test_the_composite_path_agrees_with_the_kernels(name: str) -> None:
    """Third derivatives, and other devices, take it."""
    case = PACKED_BY_NAME[name]
    call = PackedCall.drawn(case, torch.float64)
    query, key, value, grad_out = (
        x.transpose(0, 1).unsqueeze(0) for x in (call.query, call.key, call.value, call.grad_out)
    )
    options = call.options | case.places()
    state = torch.tensor([11, 0, 0])
    tensors = (query, key, value, None, *(options.get(n) for n in ("alibi_slopes", "sinks")))
    tangents = [x if x is None else torch.randn_like(x) for x in tensors]
    wanted = {"output_mask": [x is not None for x in tensors]}

    forward = ops.attention_forward(query, key, value, **options, rng_state=state)
    torch.testing.assert_close(
        composite("attention_forward")(query, key, value, **options, rng_state=state), forward, rtol=1e-9, atol=1e-9
    )
    out, logsumexp, _ = forward
    jvp_args = (query, key, value, state, *tangents)
    along = ops.attention_jvp(*jvp_args, **options)
    torch.testing.assert_close(composite("attention_jvp")(*jvp_args, **options), along, rtol=1e-9, atol=1e-9)
    args = (grad_out, call.grad_logsumexp.unsqueeze(0), query, key, value, out, logsumexp, state)
    torch.testing.assert_close(
        composite("attention_backward")(*args, **options, **wanted),
        ops.attention_backward(*args, **options, **wanted),
        rtol=1e-9,
        atol=1e-9,
    )
    args = (*args, *along[2:], torch.randn_like(out), torch.randn_like(logsumexp), *tangents)
    torch.testing.assert_close(
        composite("attention_backward_jvp")(*args, **options, **wanted),
        ops.attention_backward_jvp(*args, **options, **wanted),
        rtol=1e-9,
        atol=1e-9,
    )


def test_torch_func_derives_and_vmap_refuses() -> None:
    case = PackedCase("func", query_lengths=(5, 2))
    inputs = case.tensors(torch.float64)
    starts = case.starts()

    def ours(*args: Tensor) -> Tensor:
        return torch_attn.varlen_attention(*args, *starts, is_causal=True).square().sum()

    def plain(*args: Tensor) -> Tensor:
        return reference.varlen_attention(*args, *starts[:2], is_causal=True)[0].square().sum()

    tangents = tuple(map(torch.randn_like, inputs))
    torch.testing.assert_close(grad(ours, (0, 1, 2))(*inputs), grad(plain, (0, 1, 2))(*inputs))
    torch.testing.assert_close(jvp(ours, inputs, tangents), jvp(plain, inputs, tangents))
    with pytest.raises(RuntimeError, match="vmap: attention with cu_seqlens_q cannot be mapped"):
        vmap(ours)(*(torch.stack([x, x]) for x in inputs))


def test_dropout_of_a_sequence_is_that_of_its_batch_entry() -> None:
    """So that packing changes nothing but the layout."""
    query, key, value = (torch.randn(3, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    state = torch.tensor([5, 0, 0])
    padded = ops.attention_forward(query, key, value, dropout_p=0.4, rng_state=state)[0]
    rows = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    starts = torch.arange(4) * 9
    places = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 9, "max_seqlen_k": 9}
    packed = ops.attention_forward(*rows, dropout_p=0.4, rng_state=state, **places)[0]
    torch.testing.assert_close(packed.squeeze(0).unflatten(1, (3, 9)).transpose(0, 1), padded)


Q, K = torch.randn(7, 4, 8), torch.randn(9, 4, 8)
CU_Q, CU_K = torch.tensor([0, 3, 7]), torch.tensor([0, 5, 9])
GOOD = {"query": Q, "key": K, "value": K, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
GOOD |= {"max_seqlen_q": 4, "max_seqlen_k": 5}
BAD_CALLS = {
    "query_rank": ({"query": Q[None]}, "query must have 3 dimensions.*1, 7, 4, 8"),
    "value_rows": ({"value": K[:8]}, "key and value must have the same length.*8"),
    "heads": ({"key": K[:, :2], "value": K[:, :2]}, "query has 4 heads and key and value have 2.*enable_gqa"),
    "float_starts": ({"cu_seqlens_q": CU_Q.float()}, "cu_seqlens_q must be int64 or int32.*float32"),
    "starts_rank": ({"cu_seqlens_k": CU_K[None]}, "cu_seqlens_k must have shape.*1, 3"),
    "different_batches": ({"cu_seqlens_k": torch.tensor([0, 2, 5, 9])}, "as many sequences.*3.*4"),
    "not_from_zero": ({"cu_seqlens_q": CU_Q + 1}, "cu_seqlens_q must begin with 0.*1"),
    "decreasing": ({"cu_seqlens_k": torch.tensor([0, 5, 4])}, r"cu_seqlens_k must not decrease.*\[2\] is 4 after 5"),
    "too_long": ({"cu_seqlens_k": torch.tensor([0, 5, 10])}, "cu_seqlens_k must end at no more than the 9 rows.*10"),
    "max_seqlen": ({"max_seqlen_q": 3}, "max_seqlen_q must be at least.*is 3 and sequence 1 has length 4"),
    "no_key_starts": ({"cu_seqlens_k": None}, "cu_seqlens_k may be None only with block_table"),
    "key_lengths": ({"key_lengths": torch.tensor([6, 4])}, r"key_lengths must be between 0 and.*5.*\[0\] is 6"),
    "slopes": ({"alibi_slopes": torch.rand(3, 4)}, r"alibi_slopes.*\(2, 4\).*\(3, 4\)"),
    "table_without_lengths": (
        {"key": K.unflatten(0, (3, 3)), "value": K.unflatten(0, (3, 3)), "cu_seqlens_k": None}
        | {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
        "block_table is given without key_lengths",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_the_error_names_the_argument(name: str) -> None:
    changed, message = BAD_CALLS[name]
    with pytest.raises((RuntimeError, ValueError), match=f"(?s){message}"):
        torch_attn.varlen_attention(**(GOOD | changed))


@pytest.mark.parametrize("name", ["causal", "tail", "everything"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    case = small(PACKED_BY_NAME[name])
    options = case.kwargs(torch.float32)
    options.pop("dropout_p", None)  # opcheck compares two random draws
    inputs = [x.requires_grad_(requires_grad) for x in case.tensors(torch.float32)]
    torch.library.opcheck(
        ops.varlen_attention_with_logsumexp.default, (*inputs, *case.starts()), options | {"enable_gqa": True}
    )
    rows = [x.transpose(0, 1).unsqueeze(0) for x in inputs]
    torch.library.opcheck(ops.attention_forward.default, tuple(rows), options | case.places())


def test_compile_keeps_every_length_dynamic() -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor, starts: Tensor, longest: int) -> Tensor:
        return torch_attn.varlen_attention(query, key, key, starts, starts, longest, longest, is_causal=True).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 3), (9, 2, 30), (4, 4, 4, 4)):
            case = PackedCase("compiled", query_lengths=lengths)
            query, key, _ = (x.requires_grad_() for x in case.tensors(torch.float32))
            starts, _, longest, _ = case.starts()
            results = []
            for f in (compiled, function):
                out = f(query, key, starts, longest)
                results.append((out, *torch.autograd.grad(out.square().sum(), (query, key))))
            torch.testing.assert_close(*results)


def test_torchscript_compiles_a_call_to_the_operator() -> None:
    def function(q: Tensor, starts: Tensor, longest: int) -> Tensor:
        return torch_attn.varlen_attention(q, q, q, starts, starts, longest, longest, is_causal=True, softcap=3.0)

    scripted = torch.jit.script(function)
    assert "torch_attn::varlen_attention(" in str(scripted.graph)
    torch.testing.assert_close(scripted(Q, CU_Q, 4), function(Q, CU_Q, 4))


def test_autocast_casts_the_rows_and_keeps_logsumexp() -> None:
    inputs = [torch.randn(7, 2, 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, logsumexp = torch_attn.varlen_attention(*inputs, CU_Q, CU_Q, 4, 4, return_logsumexp=True)
    assert out.dtype == torch.bfloat16 and out.shape == (7, 2, 8)
    assert logsumexp.dtype == torch.float32 and logsumexp.shape == (2, 7)
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


def test_the_output_is_contiguous_rows() -> None:
    """So that flatten(1), what a layer does next, is a view."""
    assert torch_attn.varlen_attention(**GOOD).is_contiguous()
