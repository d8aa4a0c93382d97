"""torch_attn::projection: at::linear, which AMX multiplies in float32 as sums of bfloat16 numbers, and which is
at::linear bit by bit wherever it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ops = torch.ops.torch_attn
needs_amx = pytest.mark.skipif("amx" not in ops.cpu_isas(), reason="this CPU has no AMX")

# Shape of the input, and features of the output: whole panels, blocks and parts of a sum, and what is left of each.
SIZES = {
    "whole": ((512, 512), 768),
    "several blocks and parts": ((2, 330, 1056), 130),
    "odd": ((3, 101, 517), 67),
    "few rows": ((96, 128), 192),
}
SMALL = ((2, 3, 5), 7)
Results = tuple[Tensor, ...]


def draw(sizes: tuple[tuple[int, ...], int], bias: bool = True, dtype: torch.dtype = torch.float32) -> Results:
    shape, out_features = sizes
    x, w = torch.randn(*shape).to(dtype), torch.randn(out_features, shape[-1]).to(dtype)
    return (x, w, torch.randn(out_features).to(dtype)) if bias else (x, w)


def results(linear: Callable[..., Tensor], inputs: Results, grad: Tensor | None = None) -> Results:
    """The output and all gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = linear(*leaves)
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def grad_of(inputs: Results) -> Tensor:
    return torch.randn(*inputs[0].shape[:-1], inputs[1].size(0))


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_as_exact_as_linear(inputs: Results, grad: Tensor) -> Results:
    ours, torchs = results(ops.projection, inputs, grad), results(F.linear, inputs, grad)
    exact = results(F.linear, tuple(t.double() for t in inputs), grad)
    for name, x, y, z in zip(("out", "input", "weight", "bias"), ours, torchs, exact, strict=False):
        assert x.shape == y.shape and x.dtype == y.dtype and x.is_contiguous() == y.is_contiguous()
        error, allowed = root_mean_square(x.double() - z), 1.5 * root_mean_square(y.double() - z)
        assert error <= allowed, f"{name}: {error:.2e} is more than {allowed:.2e}"
    return ours


def kernels_in(function: Callable[[], Any]) -> list[str]:
    """What at::linear and its derivatives multiply with; nothing, where our kernels do."""
    with torch.profiler.profile() as profile:
        function()
    return [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul")]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", SIZES)
def test_is_as_exact_as_linear(name: str, bias: bool, poisoned_memory: None) -> None:
    inputs = draw(SIZES[name], bias)
    assert_as_exact_as_linear(inputs, grad_of(inputs))


@pytest.mark.parametrize("sizes", [((1, 1), 1), ((2, 3, 5), 7), ((33, 31), 65), ((1, 700), 3)], ids=str)
def test_any_size_is_as_exact_as_linear_with_every_instruction_set(
    isa: str, sizes: tuple[tuple[int, ...], int], poisoned_memory: None
) -> None:
    """A forced AMX takes all of them; of so few numbers the worst, not the mean."""
    inputs = draw(sizes)
    grad = grad_of(inputs)
    exact = results(F.linear, tuple(t.double() for t in inputs), grad)
    for x, z in zip(results(ops.projection, inputs, grad), exact, strict=True):
        torch.testing.assert_close(x.double(), z, rtol=1e-5, atol=1e-4)


@needs_amx
def test_long_calls_in_float32_run_on_amx() -> None:
    inputs = draw(SIZES["few rows"])
    assert kernels_in(lambda: results(ops.projection, inputs)) == []
    with torch.inference_mode():
        assert kernels_in(lambda: ops.projection(*inputs)) == []
    for too_small in (((95, 128), 192), ((96, 64), 64), ((1024, 63), 64), ((1024, 64), 63)):
        assert kernels_in(lambda sizes=too_small: results(ops.projection, draw(sizes))) != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_is_linear_bit_by_bit_where_amx_does_not_multiply(isa: str, dtype: torch.dtype) -> None:
    if isa == "amx" and dtype == torch.float32:
        return
    inputs = draw(SIZES["odd"], dtype=dtype)
    grad = grad_of(inputs).to(dtype)
    for x, y in zip(results(ops.projection, inputs, grad), results(F.linear, inputs, grad), strict=True):
        assert torch.equal(x, y)


def strided() -> tuple[list[Results], list[Results]]:
    """Inputs of 300 rows whose numbers can be read as they lie, and others."""
    x, w, b = draw(((2, 150, 96), 80))
    rows_apart, batch_apart = torch.randn(2, 150, 200)[..., 50:146], torch.randn(4, 150, 96)[::2]
    part = torch.randn(240, 150)[80:160, :96]
    expanded = torch.randn(1, 1, 96).expand(2, 150, 96)
    lying = [(rows_apart, w, b), (x, part, b), (torch.randn(1, 300, 200)[..., :96], part, b)]
    others = [(batch_apart, w, b), (x.transpose(0, 1), w, b), (torch.randn(2, 96, 150).transpose(1, 2), w, b)]
    others += [(expanded, w, b), (x, torch.randn(96, 80).t(), b), (x, w, torch.randn(160)[::2])]
    others += [(expanded, w[:1].expand(80, 96), b[:1].expand(80))]
    return lying, others


def test_strides() -> None:
    lying, others = strided()
    for inputs in lying + others:
        rows, columns, features = *inputs[0].shape[:2], inputs[1].size(0)
        transposed = torch.randn(columns, rows, features).transpose(0, 1)
        for grad in (grad_of(inputs), transposed, torch.randn(1, 1, 1).expand(rows, columns, features)):
            exact = results(F.linear, tuple(t.double() for t in inputs), grad)
            for actual, expected in zip(results(ops.projection, inputs, grad), exact, strict=True):
                torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


@needs_amx
def test_rows_apart_and_parts_of_larger_weights_are_read_as_they_lie() -> None:
    for inputs in strided()[0]:
        with torch.profiler.profile() as profile:
            results(ops.projection, inputs)
        names = {event.name for event in profile.events()}
        assert "torch_attn::projection_backward" in names
        assert not names & {"aten::mm", "aten::addmm", "aten::clone"}


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["input", "weight", "bias", "grad"])
def test_infinite_numbers_give_what_linear_gives(place: int, value: float) -> None:
    tensors = [*draw(((256, 96), 96)), torch.randn(256, 96)]
    tensors[place].view(-1)[70] = value
    *inputs, grad = tensors
    for x, y in zip(results(ops.projection, inputs, grad), results(F.linear, inputs, grad), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_the_ends_of_float32s_range() -> None:
    """The largest numbers do not overflow on the way; small ones are right to 24 bits of what they add up to."""
    largest = torch.finfo(torch.float32).max
    x, w = torch.zeros(512, 64), torch.eye(64)
    x[:, 0], x[:, 1], x[:, 2] = largest, -largest, 1e-30
    assert torch.equal(ops.projection(x, w), x)


@pytest.mark.parametrize(
    "shape, out_features", [((0, 64), 64), ((2, 0, 64), 64), ((128, 64), 0), ((128, 0), 64)], ids=str
)
def test_empty(isa: str, shape: tuple[int, ...], out_features: int) -> None:
    inputs = (torch.randn(*shape), torch.randn(out_features, shape[-1]), torch.randn(out_features))
    for x, y in zip(results(ops.projection, inputs), results(F.linear, inputs), strict=True):
        assert torch.equal(x, y)


def test_one_dimension_and_wrong_sizes_are_linears() -> None:
    x, w, b = draw(((600, 64), 64))
    assert torch.equal(ops.projection(x[0], w, b), F.linear(x[0], w, b))
    for inputs in ((x[:, :-1], w, b), (x, w, b[:-1]), (x, w[0], b), (x.double(), w, b)):
        with pytest.raises(RuntimeError) as expected:
            F.linear(*inputs)
        with pytest.raises(RuntimeError) as actual:
            ops.projection(*inputs)
        assert str(actual.value) == str(expected.value)


def test_gradients_that_are_not_asked_for_are_not_computed() -> None:
    inputs = draw(SIZES["few rows"])
    expected = results(ops.projection, inputs)[1:]
    for wanted in range(3):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        out = ops.projection(*leaves)
        assert torch.equal(torch.autograd.grad(out.sum(), leaves[wanted])[0], expected[wanted])
    with torch.no_grad():
        assert ops.projection(*inputs).grad_fn is None


def test_in_place_changes_of_what_backward_reads_are_noticed() -> None:
    x, w, b = (t.requires_grad_() for t in draw(SIZES["few rows"]))
    out = ops.projection(x, w, b)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_two_threads_and_every_run_give_the_same_bits() -> None:
    inputs = draw(SIZES["several blocks and parts"])
    grad = grad_of(inputs)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(results(ops.projection, inputs, grad)[:3])  # the bias's is a sum of PyTorch's
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("sizes", [SMALL, SIZES["few rows"]], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(sizes: tuple[tuple[int, ...], int], requires_grad: bool, bias: bool) -> None:
    """Traced, it is at::linear, whose sums are rounded otherwise: of a hundred numbers by up to 1e-5 and more."""
    inputs = tuple(t.requires_grad_(requires_grad) for t in draw(sizes, bias))
    rounded = {"rtol": 1e-4, "atol": 1e-4}
    torch.library.opcheck(ops.projection.default, inputs, **rounded)
    grad = grad_of(inputs).requires_grad_(requires_grad)
    torch.library.opcheck(ops.projection_backward.default, (grad, *inputs[:2], [True, True, bias]), **rounded)
    torch.library.opcheck(ops.projection_backward.default, (grad, None, inputs[1], [True, False, bias]), **rounded)


def test_derivatives(isa: str) -> None:
    inputs = tuple(t.requires_grad_() for t in draw(SMALL, dtype=torch.float64))
    assert gradcheck(ops.projection, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ops.projection, inputs, check_batched_grad=True)
    grad = grad_of(inputs).double().requires_grad_()
    assert gradcheck(lambda g, x, w: ops.projection_backward(g, x, w, [True] * 3), (grad, *inputs[:2]))


@pytest.mark.parametrize("sizes", [SMALL, SIZES["few rows"]], ids=str)
def test_second_derivatives_and_forward_mode_are_linears(sizes: tuple[tuple[int, ...], int]) -> None:
    inputs = draw(sizes)
    grad = grad_of(inputs)
    tangents = [torch.randn_like(t) for t in inputs]

    def derivatives(linear: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Results:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        first = torch.autograd.grad(linear(*leaves), leaves, grad.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), leaves[:2])
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t.detach(), d.to(dtype)) for t, d in zip(leaves, tangents, strict=True)]
            forward = fwAD.unpack_dual(linear(*duals)).tangent
        assert forward is not None
        return (*second, forward)

    exact = derivatives(F.linear, torch.float64)
    for x, z in zip(derivatives(ops.projection), exact, strict=True):
        torch.testing.assert_close(x.double(), z, rtol=1e-4, atol=1e-3 * z.abs().max().item())


def test_torch_func() -> None:
    x, w, b = draw(((4, 128, 64), 96))
    mapped = torch.vmap(ops.projection, in_dims=(0, None, None))(x, w, b)
    torch.testing.assert_close(mapped, F.linear(x, w, b), rtol=1e-4, atol=1e-4)
    each = torch.func.vmap(torch.func.grad(lambda w, x: ops.projection(x, w, b).square().sum()), in_dims=(None, 0))
    expected = [torch.func.grad(lambda w, x: F.linear(x, w, b).square().sum())(w, x[i]) for i in range(4)]
    torch.testing.assert_close(each(w, x), torch.stack(expected), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("sizes", [SMALL, SIZES["few rows"]], ids=str)
def test_autocast_casts_as_linear_does(sizes: tuple[tuple[int, ...], int]) -> None:
    inputs = draw(sizes)
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(results(ops.projection, inputs), results(F.linear, inputs), strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype


@needs_amx
def test_lower_precision_that_was_asked_for_is_linears() -> None:
    inputs = draw(SIZES["few rows"])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(ops.projection(*inputs), F.linear(*inputs))
    finally:
        torch.set_float32_matmul_precision(before)


def test_dispatch_modes_and_compilers_see_linear() -> None:
    inputs = draw(SIZES["few rows"])
    with FlopCounterMode(display=False) as counter:
        results(ops.projection, inputs)
    assert counter.get_total_flops() == 3 * 2 * 96 * 128 * 192

    torch.compiler.reset()
    compiled = torch.compile(lambda *t: ops.projection(*t), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (96, 5):
        some = (torch.randn(rows, 128), *inputs[1:])
        for x, y in zip(results(compiled, some), results(F.linear, some), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_checkpoint() -> None:
    inputs = draw(SIZES["few rows"])
    recomputed = results(lambda *t: checkpoint(ops.projection, *t, use_reentrant=False), inputs)
    for x, y in zip(recomputed, results(ops.projection, inputs), strict=True):
        assert torch.equal(x, y)
