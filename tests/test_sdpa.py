"""patch_sdpa: which calls of PyTorch's scaled_dot_product_attention it reaches, serves, and leaves to PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as imported_before
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torch_attn import patch_sdpa

B, H, L, S, D, V = 2, 4, 5, 7, 8, 6


def inputs(
    query: tuple[int, ...] = (B, H, L, D), heads: int | None = None, requires_grad: bool = False
) -> list[Tensor]:
    *lead, _, _ = query
    if heads is not None:
        lead[-1] = heads
    shapes = (query, (*lead, S, D), (*lead, S, V))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes]


def bool_mask(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.3


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


CALLS: dict[str, Callable[[], tuple[list[Tensor], dict[str, Any]]]] = {
    "two_dimensions": lambda: (inputs((L, D)), {}),
    "three_dimensions": lambda: (inputs((B, L, D)), {}),
    "five_dimensions": lambda: (inputs((2, B, H, L, D)), {}),
    "heads_that_broadcast": lambda: (inputs(heads=1), {}),
    "grouped_heads": lambda: (inputs(heads=2), {"enable_gqa": True}),
    "bool_mask": lambda: (inputs(), {"attn_mask": bool_mask(B, 1, L, S)}),
    "bool_mask_of_one_row": lambda: (inputs(), {"attn_mask": bool_mask(1, S)}),
    "float_mask": lambda: (inputs(), {"attn_mask": torch.randn(H, L, S, dtype=torch.float64)}),
    "float_mask_of_float32": lambda: (inputs(), {"attn_mask": torch.randn(L, S)}),
    "masked_rows": lambda: (inputs(), {"attn_mask": torch.zeros(L, S, dtype=torch.bool)}),
    "causal": lambda: (inputs(), {"is_causal": True}),
    "causal_upper_left": lambda: (inputs(), {"attn_mask": causal_upper_left(L, S)}),
    "causal_lower_right": lambda: (inputs(), {"attn_mask": causal_lower_right(L, S)}),
    "scale": lambda: (inputs(), {"scale": -0.3}),
    "dropped": lambda: (inputs(), {"dropout_p": 1.0}),
    "no_queries": lambda: (inputs((B, H, 0, D)), {}),
}

FALLBACKS: dict[str, tuple[Callable[[], tuple[list[Tensor], dict[str, Any]]], str]] = {
    "another_number_of_value_heads": (
        lambda: ([*inputs(heads=2)[:2], inputs()[2]], {"enable_gqa": True}),
        "key and value with different numbers of heads",
    ),
    "a_bias_of_another_size": (
        lambda: (inputs(), {"attn_mask": causal_upper_left(L, S + 1)}),
        "a CausalBias of another size",
    ),
    "jagged": (
        lambda: (
            [torch.nested.nested_tensor([torch.randn(3, H, D), torch.randn(5, H, D)], layout=torch.jagged).mT] * 3,
            {},
        ),
        "nested tensors",
    ),
}


def both(arguments: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor, patch_sdpa]:
    expected = F.scaled_dot_product_attention(*arguments, **options)
    with patch_sdpa() as patch:
        actual = F.scaled_dot_product_attention(*arguments, **options)
    return actual, expected, patch


@pytest.mark.parametrize("name", CALLS)
def test_what_pytorch_computes_comes_from_our_kernels(name: str) -> None:
    arguments, options = CALLS[name]()
    before = kernel_calls()
    actual, expected, patch = both(arguments, options)
    assert (patch.calls, patch.fallbacks) == (1, {})
    assert kernel_calls() - before == (1 if actual.numel() else 0)
    assert_close(actual, expected)


def test_gradients_are_pytorchs() -> None:
    arguments = inputs(requires_grad=True)
    mask = torch.randn(H, 1, S, dtype=torch.float64, requires_grad=True)
    actual, expected, _ = both(arguments, {"attn_mask": mask})
    leaves, cotangent = [*arguments, mask], torch.randn_like(expected)
    assert_close(torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_served_comes_from_pytorch_with_the_reason(name: str) -> None:
    make, reason = FALLBACKS[name]
    before = kernel_calls()
    actual, expected, patch = both(*make())
    assert (patch.calls, patch.fallbacks) == (0, {reason: 1})
    assert kernel_calls() == before
    assert_close(actual, expected)


def test_errors_of_calls_that_are_not_served_are_pytorchs() -> None:
    x = torch.ones(1, 1, 4, 4, dtype=torch.int8)
    mask = {"attn_mask": bool_mask(L, S), "is_causal": True}
    with patch_sdpa() as patch:
        with pytest.raises(RuntimeError, match="expected scalar type"):
            F.scaled_dot_product_attention(x, x, x)
        with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
            F.scaled_dot_product_attention(*inputs(), **mask)
    assert patch.fallbacks == {"dtype torch.int8": 1, "attn_mask together with is_causal=True": 1}


@pytest.mark.parametrize(
    "function",
    [
        imported_before,
        F.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    ],
    ids=["imported_before", "F", "C", "aten", "aten_overload"],
)
def test_the_name_it_is_called_by_does_not_matter(function: Callable[..., Tensor]) -> None:
    arguments = inputs()
    before = kernel_calls()
    with patch_sdpa() as patch:
        function(*arguments)
    assert patch.calls == kernel_calls() - before == 1


def test_outside_the_block_nothing_changes() -> None:
    arguments = inputs()
    expected = F.scaled_dot_product_attention(*arguments)
    with pytest.raises(KeyError, match="in the block"), patch_sdpa() as patch:
        raise KeyError("in the block")
    before = kernel_calls()
    assert torch.equal(F.scaled_dot_product_attention(*arguments), expected)
    assert kernel_calls() == before and patch.calls == 0


def test_of_nested_blocks_the_innermost_counts() -> None:
    arguments = inputs()
    with patch_sdpa() as outer:
        with patch_sdpa() as inner:
            F.scaled_dot_product_attention(*arguments)
        F.scaled_dot_product_attention(*arguments)
        with outer:
            F.scaled_dot_product_attention(*arguments)
    assert (inner.calls, outer.calls) == (1, 2)
    before = kernel_calls()
    F.scaled_dot_product_attention(*arguments)
    assert kernel_calls() == before


def test_it_decorates_functions() -> None:
    patch = patch_sdpa()

    @patch
    def attend(depth: int) -> Tensor:
        """Attends."""
        return attend(depth - 1) if depth else F.scaled_dot_product_attention(*inputs())

    attend(2), attend(0)
    assert patch.calls == 2
    assert attend.__doc__ == "Attends."
    before = kernel_calls()
    F.scaled_dot_product_attention(*inputs())
    assert kernel_calls() == before


def test_other_threads_are_not_patched_and_may_share_one_patch() -> None:
    arguments, shared, unpatched = inputs(), patch_sdpa(), []
    before = kernel_calls()

    def plain() -> None:
        F.scaled_dot_product_attention(*arguments)
        unpatched.append(kernel_calls() - before)

    def patched() -> None:
        for _ in range(50):
            with shared:
                F.scaled_dot_product_attention(*arguments)

    def run(*functions: Callable[[], None]) -> None:
        threads = [threading.Thread(target=function) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with patch_sdpa() as patch:
        run(plain)
    assert (patch.calls, unpatched) == (0, [0])
    run(patched, patched, patched)
    assert shared.calls == 150


BACKWARDS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "method": lambda out, leaves: out.sum().backward(),
    "function": lambda out, leaves: torch.autograd.backward(out, torch.ones_like(out)),
    "grad": lambda out, leaves: torch.autograd.grad(out, leaves, torch.ones_like(out)),
}


@pytest.mark.parametrize("name,reentrant", [("method", False), ("method", True), ("function", False), ("grad", False)])
def test_checkpointing_recomputes_on_our_kernels(name: str, reentrant: bool) -> None:
    leaves = inputs(requires_grad=True)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sum(), leaves)
    with patch_sdpa() as patch:
        out = checkpoint(F.scaled_dot_product_attention, *leaves, use_reentrant=reentrant)
        assert patch.calls == 1
        gradients = BACKWARDS[name](out, leaves)
    assert patch.calls == 2
    assert_close(gradients or tuple(x.grad for x in leaves), expected)


def test_pytorchs_own_attention_module_is_served_where_it_makes_the_call() -> None:
    x = torch.randn(B, L, D, requires_grad=True)
    module = nn.MultiheadAttention(D, 2, batch_first=True)
    expected, _ = module(x, x, x, need_weights=False)
    before = kernel_calls()
    with patch_sdpa() as patch:
        actual, _ = module(x, x, x, need_weights=False)
        module(x, x, x, need_weights=True)
        assert patch.calls == kernel_calls() - before == 1
        compiled, _ = torch.compile(module, backend="aot_eager")(x, x, x, need_weights=False)
    assert kernel_calls() - before == 1, "its documentation may say more, then"
    assert_close([actual, compiled], [expected] * 2)


def test_autocast_and_func_transforms_pass_through() -> None:
    query, key, value = (x.float() for x in inputs())
    with patch_sdpa() as patch:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16
        per_sample = torch.func.vmap(torch.func.grad(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sum()))
        gradients = per_sample(query, key, value)
    assert patch.calls == 2
    expected = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, key, value).sum())(query)
    assert_close(gradients, expected)


class Attend(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return imported_before(query, key, value, is_causal=True)


@pytest.mark.parametrize("where", ["around_the_call", "inside", "decorator"])
def test_compiled_functions_run_our_kernels_inside_and_pytorchs_outside(where: str) -> None:
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend: Callable[..., Tensor] = Attend()
    if where == "decorator":
        attend = patch_sdpa()(attend)
    elif where == "inside":

        def attend(*arguments: Tensor) -> Tensor:
            with patch_sdpa():
                return imported_before(*arguments, is_causal=True)

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    arguments = inputs(requires_grad=True)
    expected = Attend()(*arguments)
    for _ in range(3):
        before = kernel_calls()
        with patch_sdpa() if where == "around_the_call" else nullcontext():
            assert_close(compiled(*arguments), expected)
        assert kernel_calls() - before == 1
        before = kernel_calls()
        assert_close(compiled(*arguments), expected)
        assert kernel_calls() - before == (0 if where == "around_the_call" else 1)
    assert count.frame_count == (2 if where == "around_the_call" else 1)


def test_inductor_compiles_the_patched_call_with_gradients() -> None:
    torch._dynamo.reset()
    arguments = inputs(requires_grad=True)
    expected = torch.autograd.grad(Attend()(*arguments).sum(), arguments)
    before = kernel_calls()
    with patch_sdpa():
        gradients = torch.autograd.grad(torch.compile(Attend(), fullgraph=True)(*arguments).sum(), arguments)
    assert kernel_calls() - before == 1
    assert_close(gradients, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_made_inside_holds_our_operator_and_one_made_outside_is_served_inside(strict: bool) -> None:
    arguments = tuple(inputs())
    expected = Attend()(*arguments)
    with patch_sdpa():
        ours = torch.export.export(Attend(), arguments, strict=strict).module()
    before = kernel_calls()
    assert_close(ours(*arguments), expected)
    assert kernel_calls() - before == 1
    theirs = torch.export.export(Attend(), arguments, strict=strict).module()
    theirs(*arguments)
    assert kernel_calls() - before == 1
    with patch_sdpa() as patch:
        assert_close(theirs(*arguments), expected)
    assert kernel_calls() - before == 2 and patch.calls == 1


def test_a_trace_made_inside_holds_our_operator() -> None:
    arguments = tuple(inputs())
    with patch_sdpa():
        traced = torch.jit.trace(Attend(), arguments)
    before = kernel_calls()
    assert_close(traced(*arguments), Attend()(*arguments))
    assert kernel_calls() - before == 1


def test_compiled_torchscript_is_not_reached() -> None:
    arguments = inputs()
    scripted = torch.jit.script(Attend())
    before = kernel_calls()
    with patch_sdpa() as patch:
        assert_close(scripted(*arguments), Attend()(*arguments))
    assert kernel_calls() == before + 1 and patch.calls == 1  # by Attend, not by the script
