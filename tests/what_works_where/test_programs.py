"""Each route into a compiled or saved program gives eager's answers, of each option: the table's second section."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .layers import HEADS, LONGEST, OPTIONS, WIDTH, AllOptions, Layer
from .programs import SHAPES, Program, agree, answers, example, in_bfloat16, model
from .table import works

ops = torch.ops.torch_attn
GRADIENTS = "with gradients"


class Autocasting(nn.Module):
    """Autocast inside the model, where a saved program keeps it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x)


def eager(module: nn.Module) -> Program:
    return module


def inductor(module: nn.Module) -> Program:
    program = torch.compile(module, fullgraph=True, dynamic=True)
    answers(program, example(3, 9))  # sizes that no other dimension has: equal ones would be taken for one

    def without_recompiling(x: Tensor) -> list[Tensor]:
        with torch._dynamo.config.patch(error_on_recompile=True):
            return program(x)

    return without_recompiling


def aot_eager(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@works("`torch.compile` (inductor)", f"{GRADIENTS}; no graph break, batch and length change without recompiling")
def test_compile(option: str) -> None:
    agree(option, inductor, dynamic=True)


@works("the same, under autocast", GRADIENTS)
def test_compile_autocast(option: str) -> None:
    agree(option, aot_eager, around=in_bfloat16, eager_around=in_bfloat16)


@works(
    "`torch.func` in `torch.compile`",
    "`grad`, `jvp`, Hessian-vector products, `vmap`, per-sample gradients; also the way to compiled second "
    "derivatives, as PyTorch refuses to differentiate a compiled function's backward",
)
def test_compile_functional_transforms(option: str) -> None:
    layer = Layer(option, torch.float64)
    x, tangent = (torch.randn(2, HEADS, 5, WIDTH, dtype=torch.float64) for _ in range(2))

    def loss(x: Tensor) -> Tensor:
        return layer(x).sin().sum()

    def of_a_sample(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda y: function(y.unsqueeze(0))

    def transforms(x: Tensor) -> tuple[Any, ...]:
        return (
            grad(loss)(x),
            jvp(layer, (x,), (tangent,)),
            jvp(grad(loss), (x,), (tangent,)),
            grad(lambda y: jvp(loss, (y,), (tangent,))[1])(x),
            vmap(of_a_sample(layer), randomness="same")(x),
            vmap(grad(of_a_sample(loss)), randomness="same")(x),
        )

    torch._dynamo.reset()
    seed = int(torch.randint(2**31, ()))
    results = []
    for function in (transforms, aot_eager(transforms)):
        torch.manual_seed(seed)
        results.append(function(x))
    torch.testing.assert_close(*results)


def test_a_compiled_backward_has_no_backward() -> None:
    """PyTorch's limit, for every function; not silence, and not a wrong number."""
    torch._dynamo.reset()
    x = torch.randn(1, HEADS, 5, WIDTH, requires_grad=True)
    out = aot_eager(Layer("plain", x.dtype))(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


def compiled_backward() -> contextlib.AbstractContextManager:
    return compiled_autograd._enable(lambda graph: graph)


@works("compiled autograd", "eager's backward as one graph")
def test_compiled_autograd(option: str) -> None:
    agree(option, eager, around=compiled_backward)


def exported(module: nn.Module) -> ExportedProgram:
    sizes = {1: Dim("batch", min=1, max=LONGEST - 1), 3: Dim("length", min=3, max=LONGEST - 1)}
    return torch.export.export(module, (example(*SHAPES[0]),), dynamic_shapes=(sizes,))


def exported_and_loaded(module: nn.Module) -> Program:
    file = io.BytesIO()
    torch.export.save(exported(module), file)
    file.seek(0)
    return torch.export.load(file).module()


def exported_with_autocast(module: nn.Module) -> Program:
    return exported_and_loaded(Autocasting(module))


@works("`torch.export`, saved and loaded", f"{GRADIENTS}; dynamic batch and length")
def test_export(option: str) -> None:
    agree(option, exported_and_loaded, dynamic=True)


@works("the same, autocast inside", GRADIENTS)
def test_export_autocast(option: str) -> None:
    agree(option, exported_with_autocast, dynamic=True, eager_around=in_bfloat16)


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


class WithoutAndWithAutocast(nn.Module):
    """Both, so that a package is compiled once; with autocast, all options but the last, dropout."""

    def __init__(self, model: AllOptions) -> None:
        super().__init__()
        self.model, self.autocasting = model, Autocasting(AllOptions(model.layers[:-1]))

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model(x) + self.autocasting(x)


@functools.cache
def package() -> Path:
    """The model compiled ahead of time, in a file that C++ can run, too."""
    file = Path(folder().name) / "model.pt2"
    torch._inductor.aoti_compile_and_package(exported(WithoutAndWithAutocast(model())), package_path=str(file))
    return file


def packaged(module: nn.Module) -> Program:
    program = torch._inductor.aoti_load_package(str(package()))
    return lambda x: program(x)[: len(OPTIONS)]


def packaged_with_autocast(module: nn.Module) -> Program:
    program = torch._inductor.aoti_load_package(str(package()))
    return lambda x: program(x)[len(OPTIONS) :]


@works("AOTInductor package", "inference; dynamic batch and length")
def test_ahead_of_time(option: str) -> None:
    agree(option, packaged, dynamic=True, differentiate=False)


ORDER = "Its test would need two draws in one package, and their order is inductor's to choose."


@works("the same, autocast inside", "inference; dynamic batch and length", without={"dropout": ORDER})
def test_ahead_of_time_autocast(option: str) -> None:
    agree(option, packaged_with_autocast, dynamic=True, differentiate=False, eager_around=in_bfloat16)


def traced(module: nn.Module) -> Program:
    return torch.jit.trace(module, example(*SHAPES[0]), check_trace=False)  # dropout would differ


def saved_and_loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def scripted_and_loaded(module: nn.Module) -> Program:
    return saved_and_loaded(torch.jit.script(module))


def traced_and_loaded(module: nn.Module) -> Program:
    return saved_and_loaded(traced(module))


def frozen(module: nn.Module) -> Program:
    return saved_and_loaded(torch.jit.freeze(torch.jit.script(module).eval()))


def optimized_for_inference(module: nn.Module) -> Program:
    return torch.jit.optimize_for_inference(torch.jit.script(module).eval())


@works("`torch.jit.script`, saved and loaded", f"{GRADIENTS}, after loading as before")
def test_script(option: str) -> None:
    agree(option, torch.jit.script, dynamic=True)
    agree(option, scripted_and_loaded, dynamic=True)


@works("`torch.jit.trace`, saved and loaded", f"{GRADIENTS}, after loading as before")
def test_trace(option: str) -> None:
    agree(option, traced)
    agree(option, traced_and_loaded)


@works("`torch.jit.freeze`, `optimize_for_inference`", "inference")
def test_freeze(option: str) -> None:
    agree(option, frozen, dynamic=True, differentiate=False)
    agree(option, optimized_for_inference, dynamic=True, differentiate=False)


@works(
    "script and trace, under autocast",
    f"{GRADIENTS}; autocast written inside a scripted function reaches only PyTorch's own operators",
)
def test_torchscript_autocast(option: str) -> None:
    for route in (torch.jit.script, scripted_and_loaded, traced_and_loaded):
        agree(option, route, around=in_bfloat16, eager_around=in_bfloat16)


def checkpointed(module: nn.Module) -> Program:
    return lambda x: checkpoint(module, x, use_reentrant=False)


def checkpointed_reentrant(module: nn.Module) -> Program:
    return lambda x: checkpoint(module, x, use_reentrant=True)


def checkpointed_selectively(module: nn.Module) -> Program:
    contexts = functools.partial(create_selective_checkpoint_contexts, [ops.attention_forward.default])
    return lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts)


def checkpointed_and_compiled(module: nn.Module) -> Program:
    return aot_eager(checkpointed(module))


def checkpointed_selectively_and_compiled(module: nn.Module) -> Program:
    return aot_eager(checkpointed_selectively(module))


def test_checkpoints_recompute_what_they_should() -> None:
    x = example(*SHAPES[0])
    calls = {}
    routes = eager, checkpointed, checkpointed_selectively
    routes += checkpointed_and_compiled, checkpointed_selectively_and_compiled
    for route in routes:
        torch._dynamo.reset()
        before = ops.kernel_calls()
        answers(route(model()), x)
        calls[route.__name__] = (ops.kernel_calls() - before) / len(x)
    assert list(calls.values()) == [1, 2, 1, 2, 1], calls


@works("activation checkpointing", f"{GRADIENTS}; dropout is replayed")
def test_checkpoint(option: str) -> None:
    agree(option, checkpointed)


@works("the same, compiled, under autocast", GRADIENTS)
def test_checkpoint_compiled(option: str) -> None:
    agree(option, checkpointed_and_compiled, around=in_bfloat16, eager_around=in_bfloat16)


@works("selective checkpointing", f"{GRADIENTS}; the policy names `torch.ops.torch_attn.attention_forward.default`")
def test_selective_checkpoint(option: str) -> None:
    agree(option, checkpointed_selectively)


@works("the same, compiled, under autocast", GRADIENTS)
def test_selective_checkpoint_compiled(option: str) -> None:
    agree(option, checkpointed_selectively_and_compiled, around=in_bfloat16, eager_around=in_bfloat16)


@works("fake tensors", f"{GRADIENTS}; shapes, strides and dtypes are the real ones")
def test_fake_tensors(option: str) -> None:
    layer, x = Layer(option, torch.float32), torch.randn(2, HEADS, 5, WIDTH)

    def results() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        out = layer(leaf)
        return [out, *torch.autograd.grad(out.sum(), [leaf, *layer.parameters()])]

    real = results()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x)
        fake = results()
    for a, b in zip(fake, real, strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
