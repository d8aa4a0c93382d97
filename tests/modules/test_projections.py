"""MultiheadAttention in float32 at sizes where AMX multiplies its projections (torch_attn::projection): as exact as
nn.MultiheadAttention, and the same through every route into a saved or compiled program."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_attn

from .cases import ours, results

BATCH, QUERY_LENGTH, KEY_LENGTH, EMBED_DIM, HEADS = 2, 70, 90, 128, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
]


def inputs(sharing: str, batch_first: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def draw(length: int) -> Tensor:
        shape = (BATCH, length, EMBED_DIM) if batch_first else (length, BATCH, EMBED_DIM)
        return torch.randn(shape).to(dtype).requires_grad_()

    if sharing == "self":
        x = draw(QUERY_LENGTH)
        return {"query": x, "key": x, "value": x}
    query, key = draw(QUERY_LENGTH), draw(KEY_LENGTH)
    return {"query": query, "key": key, "value": key if sharing == "cross" else draw(KEY_LENGTH)}


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    converted: dict[int, Tensor] = {}
    for x in arguments.values():
        converted.setdefault(id(x), x.detach().to(dtype).requires_grad_())
    return {name: converted[id(x)] for name, x in arguments.items()}


@pytest.mark.parametrize("sharing", ["self", "cross", "separate"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_errors_are_not_above_those_of_pytorch(sharing: str, batch_first: bool, bias: bool, need_weights: bool) -> None:
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, bias=bias, batch_first=batch_first)
    exact_module = nn.MultiheadAttention(EMBED_DIM, HEADS, bias=bias, batch_first=batch_first, dtype=torch.float64)
    exact_module.load_state_dict(theirs.state_dict())
    arguments = inputs(sharing, batch_first)
    options = {"need_weights": need_weights}
    exact = results(exact_module, in_dtype(arguments, torch.float64) | options)
    expected = results(theirs, in_dtype(arguments, torch.float32) | options)
    actual = results(ours(theirs), in_dtype(arguments, torch.float32) | options)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        error, torchs = ((x.double() - exact[name]).square().mean().sqrt().item() for x in (value, expected[name]))
        # The key's bias has no gradient but rounding errors: a shift of all scores of a row by the same number.
        scale = exact[name].abs().max().item()
        assert error <= 1.5 * torchs + 1e-7 * scale, (name, error, torchs)


def through_script(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def through_trace(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    return torch.jit.trace(module, (x, x, x))


def through_export(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(module, (x, x, x)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def through_decompositions(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    return torch.export.export(module, (x, x, x)).run_decompositions().module()


def through_compile(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def through_replacement(module: nn.Module, x: Tensor) -> Callable[..., Any]:
    theirs = nn.Sequential(nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True))
    theirs[0].load_state_dict(module.state_dict())
    return torch_attn.replace_mha(theirs)[0]


@pytest.mark.parametrize(
    "route",
    [through_script, through_trace, through_export, through_decompositions, through_compile, through_replacement],
    ids=lambda route: route.__name__,
)
def test_every_route_gives_the_same(route: Callable[..., Callable[..., Any]]) -> None:
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    x = torch.randn(BATCH, QUERY_LENGTH, EMBED_DIM)
    for actual, expected in zip(route(module, x)(x, x, x), module(x, x, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("amx" not in torch.ops.torch_attn.cpu_isas(), reason="this CPU has no AMX")
@pytest.mark.parametrize("sharing", ["self", "cross", "separate"])
def test_every_projection_runs_on_amx(sharing: str) -> None:
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    arguments = inputs(sharing, True)
    with torch.profiler.profile() as profile:
        results(module, arguments | {"need_weights": False})
    names = [event.name for event in profile.events()]
    assert names.count("torch_attn::projection_backward") == {"self": 2, "cross": 3, "separate": 4}[sharing]
    assert not {"aten::mm", "aten::addmm", "aten::linear"} & set(names)
