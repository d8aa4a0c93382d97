"""One model with all options, and what it answers: eager, and after any route into a compiled or saved program.

A route is taken once, for all options; ``agree`` then judges each option apart.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..conftest import SESSION_SEED
from .layers import HEADS, OPTIONS, WIDTH, AllOptions

Program = Callable[[Tensor], list[Tensor]]
Route = Callable[[nn.Module], Program]  # what is done to the model
Context = Callable[[], contextlib.AbstractContextManager]
Answers = list[list[Tensor]]  # of each option: the output, and the gradients of input and parameters

SHAPES = ((3, 7), (2, 11), (5, 4))  # batch and length


@functools.cache
def model() -> AllOptions:
    with torch.random.fork_rng():
        torch.manual_seed(SESSION_SEED)
        return AllOptions()


@functools.cache
def example(batch: int, length: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(SESSION_SEED + length)
        return torch.randn(len(OPTIONS), batch, HEADS, length, WIDTH)


def answers(program: Program, x: Tensor, differentiate: bool = True) -> Answers:
    torch.manual_seed(SESSION_SEED)  # what dropout draws
    if not differentiate:
        with torch.no_grad():
            return [[y] for y in program(x)]
    parameters = dict((program if isinstance(program, nn.Module) else model()).named_parameters())
    x = x.clone().requires_grad_()
    outputs = program(x)
    gradients = torch.autograd.grad(sum(y.float().sin().sum() for y in outputs), [x, *parameters.values()])
    return sorted_by_option(outputs, gradients[0], dict(zip(parameters, gradients[1:], strict=True)))


def sorted_by_option(outputs: list[Tensor], x_gradient: Tensor, gradients: dict[str, Tensor]) -> Answers:
    """``gradients`` are the parameters', by the names that these have in the model."""
    result = [[y.detach(), g] for y, g in zip(outputs, x_gradient, strict=True)]
    for name, gradient in gradients.items():
        result[int(name.partition("layers.")[2].partition(".")[0])].append(gradient)
    return result


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@functools.cache
def wanted(batch: int, length: int, differentiate: bool, around: Context) -> Answers:
    with around():
        return answers(model(), example(batch, length), differentiate)


@functools.cache
def given(route: Route, shapes: tuple[tuple[int, int], ...], differentiate: bool, around: Context) -> list[Answers]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated in the routes, and of the tracer's
        program = route(model())
        with around():
            return [answers(program, example(*shape), differentiate) for shape in shapes]


def agree(
    option: str,
    route: Route,
    *,
    dynamic: bool = False,
    differentiate: bool = True,
    around: Context = contextlib.nullcontext,
    eager_around: Context = contextlib.nullcontext,
) -> None:
    """The route's answers, and those of its gradients, are eager's; each of the two runs in a context of its own."""
    index = list(OPTIONS).index(option)
    shapes = SHAPES if dynamic else SHAPES[:1]
    for shape, actual in zip(shapes, given(route, shapes, differentiate, around), strict=True):
        exact = wanted(*shape, differentiate, eager_around)
        for a, b in zip(actual[index], exact[index], strict=True):
            torch.testing.assert_close(a, b)
