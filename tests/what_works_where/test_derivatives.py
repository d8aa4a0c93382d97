"""Each kind of derivative, of each option, is that of the reference: the first section of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from .layers import HEADS, WIDTH, Layer
from .table import works

Function = Callable[..., Tensor]
Transform = Callable[[Function], Any]
FUSED = "fused"


class Pair:
    """A layer and its reference as functions of input and parameters, with the same dropout in every call."""

    def __init__(self, option: str, *sizes: int) -> None:
        self.layer = Layer(option, torch.float64)
        names = [name for name, _ in self.layer.named_parameters()]
        self.inputs = (torch.randn(*sizes, HEADS, 5, WIDTH, dtype=torch.float64),)
        self.inputs += tuple(p.detach() for p in self.layer.parameters())
        self.tangents = tuple(torch.randn_like(x) for x in self.inputs)
        self.argnums = tuple(range(len(self.inputs)))
        self.shared = (None,) * len(names)  # the parameters' in_dims, where only the input is mapped
        self.seed = int(torch.randint(2**31, ()))

        def ours(x: Tensor, *parameters: Tensor) -> Tensor:
            torch.manual_seed(self.seed)
            return functional_call(self.layer, dict(zip(names, parameters, strict=True)), (x,))

        def exact(x: Tensor, *parameters: Tensor) -> Tensor:
            keep = None
            if self.layer.dropout_p > 0:
                torch.manual_seed(self.seed)
                keep = self.layer.keep_mask(x.detach())
            with swapped(self.layer, dict(zip(names, parameters, strict=True))):
                return self.layer.reference(x, keep)

        self.ours, self.exact = ours, exact

    def agree(self, transform: Transform) -> None:
        torch.testing.assert_close(transform(self.ours), transform(self.exact))


def swapped(layer: Layer, parameters: dict[str, Tensor]) -> Any:
    return torch.nn.utils.stateless._reparametrize_module(layer, parameters)


def loss_of(function: Function) -> Function:
    return lambda *a: function(*a).sin().sum()


def leaves(pair: Pair) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in pair.inputs)


@works("gradient", FUSED)
def test_gradient(option: str) -> None:
    pair = Pair(option, 3)

    def transform(function: Function) -> Any:
        inputs = leaves(pair)
        return torch.autograd.grad(loss_of(function)(*inputs), inputs)

    pair.agree(transform)


@works("gradient of a gradient (`create_graph=True`)", FUSED)
def test_double_backward(option: str) -> None:
    pair = Pair(option, 3)

    def transform(function: Function) -> Any:
        inputs = leaves(pair)
        first = torch.autograd.grad(loss_of(function)(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    pair.agree(transform)


@works("third derivative", "composite from the second on")
def test_third_derivative(option: str) -> None:
    pair = Pair(option, 2)

    def transform(function: Function) -> Any:
        inputs = leaves(pair)
        first = torch.autograd.grad(loss_of(function)(*inputs), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in second), inputs)

    pair.agree(transform)


@works("forward mode (`torch.autograd.forward_ad`)", FUSED)
def test_forward_mode(option: str) -> None:
    pair = Pair(option, 3)

    def transform(function: Function) -> Any:
        with fwAD.dual_level():
            duals = [fwAD.make_dual(x, t) for x, t in zip(pair.inputs, pair.tangents, strict=True)]
            return fwAD.unpack_dual(function(*duals)).tangent

    pair.agree(transform)


@works("`torch.func.grad`, `vjp`, `jvp`", FUSED)
def test_functional_gradients(option: str) -> None:
    pair = Pair(option, 3)
    pair.agree(lambda f: grad(loss_of(f), pair.argnums)(*pair.inputs))
    pair.agree(lambda f: vjp(loss_of(f), *pair.inputs)[1](torch.tensor(1.5, dtype=torch.float64)))
    pair.agree(lambda f: jvp(f, pair.inputs, pair.tangents))


@works("Hessian-vector product, forward over reverse", FUSED)
def test_forward_over_reverse(option: str) -> None:
    pair = Pair(option, 3)
    pair.agree(lambda f: jvp(grad(loss_of(f), pair.argnums), pair.inputs, pair.tangents))


@works("Hessian-vector product, reverse over forward", FUSED)
def test_reverse_over_forward(option: str) -> None:
    pair = Pair(option, 3)

    def transform(function: Function) -> Any:
        return grad(lambda *a: jvp(loss_of(function), a, pair.tangents)[1], pair.argnums)(*pair.inputs)

    pair.agree(transform)


@works("`jacrev`, `jacfwd`, `hessian`", "fused; with dropout, `jacfwd(jacrev(f), randomness=...)` for `hessian(f)`")
def test_jacobians_and_hessian(option: str) -> None:
    pair = Pair(option, 1)
    x, parameters = pair.inputs[0], pair.inputs[1:]  # not of these: a bias table has thousands of entries

    def of_x(function: Function) -> Function:
        return lambda x: function(x, *parameters)

    # torch.func.hessian in its own words, as it does not pass randomness on.
    def second(function: Function) -> Tensor:
        return jacfwd(jacrev(of_x(loss_of(function))), randomness="same")(x)

    pair.agree(lambda f: jacrev(of_x(f))(x))
    pair.agree(lambda f: jacfwd(of_x(f), randomness="same")(x))
    pair.agree(second)
    if option != "dropout":
        torch.testing.assert_close(hessian(of_x(loss_of(pair.ours)))(x), second(pair.exact))


@works("`vmap`", "fused, one call")
def test_vmap(option: str) -> None:
    pair = Pair(option, 4, 2)
    calls = torch.ops.torch_attn.kernel_calls()
    vmap(pair.ours, (0, *pair.shared), randomness="different")(*pair.inputs)
    assert torch.ops.torch_attn.kernel_calls() == calls + 1
    pair.agree(lambda f: vmap(f, (0, *pair.shared), randomness="different")(*pair.inputs))


@works("per-sample gradients (`vmap(grad(f))`)", "fused, one call")
def test_per_sample_gradients(option: str) -> None:
    pair = Pair(option, 4, 1)
    gradients = lambda f: vmap(grad(loss_of(f), pair.argnums), (0, *pair.shared), randomness="different")  # noqa: E731
    calls = torch.ops.torch_attn.kernel_calls()
    gradients(pair.ours)(*pair.inputs)
    assert torch.ops.torch_attn.kernel_calls() == calls + 1
    pair.agree(lambda f: gradients(f)(*pair.inputs))


@works("batched gradients (`is_grads_batched`)", "fused, a call for each")
def test_batched_gradients(option: str) -> None:
    pair = Pair(option, 2)
    cotangents = torch.randn(3, *pair.exact(*pair.inputs).shape, dtype=torch.float64)

    def transform(function: Function) -> Any:
        inputs = leaves(pair)
        return torch.autograd.grad(function(*inputs), inputs, cotangents, is_grads_batched=True)

    pair.agree(transform)


@works("`inference_mode`, `no_grad`")
def test_without_gradients(option: str) -> None:
    pair = Pair(option, 3)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            pair.agree(lambda f: f(*pair.inputs))


@works("autocast", "query, key and value are cast; gradients come in their own dtype")
def test_autocast(option: str) -> None:
    pair = Pair(option, 3)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = tuple(x.float().requires_grad_() for x in pair.inputs)
        with torch.autocast("cpu", dtype=dtype):
            out = pair.ours(*inputs)
        wanted = pair.ours(inputs[0].to(dtype), *inputs[1:])
        assert out.dtype == wanted.dtype and torch.equal(out, wanted)
        of = [torch.autograd.grad(y.float().sin().sum(), inputs) for y in (out, wanted)]
        for actual, exact in zip(*of, strict=True):
            assert actual.dtype == torch.float32 and torch.equal(actual, exact)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_dropout_as_it_is_told(randomness: str) -> None:
    pair = Pair("dropout", 1, 2)
    inputs = pair.inputs[0].expand(3, *pair.inputs[0].shape[1:])
    out = vmap(pair.ours, randomness=randomness)(inputs)
    assert torch.equal(out[0], out[1]) == (randomness == "same")
