"""MultiheadAttention under TorchScript, tracing, torch.compile, torch.export and torch.func, and what it hands to the
kernel."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_attn

from .cases import BATCH, EMBED_DIM, HEADS, QUERY_LENGTH, Case, detached, ours, results

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CASES = [
    Case(),
    Case("plain", "cross", "bool", "bool", "no_weights"),
    Case("plain", "self", "causal", weights="no_weights"),
    Case("bias_kv_zero_attn", "cross", "float_per_head", "float"),
    Case("kdim_vdim", "separate", "bool_per_head", weights="per_head"),
    Case("no_bias", "self", "none", "bool", "no_weights", batched=False),
]


class Caller(nn.Module):
    """Calls the module with the options of a case fixed, as tracing and export take tensors only."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.same_key, self.same_value = (arguments["key"] is arguments[n] for n in ("query", "value"))
        self.options = {n: x for n, x in arguments.items() if not isinstance(x, Tensor)}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Any:
        key = query if self.same_key else key
        value = key if self.same_value else value
        out, weights = self.module(
            query, key, value, attn_mask=attn_mask, key_padding_mask=key_padding_mask, **self.options
        )
        return out if weights is None else (out, weights)


def tensors(arguments: dict[str, Any]) -> tuple[Tensor | None, ...]:
    names = ("query", "key", "value", "attn_mask", "key_padding_mask")
    return tuple(x if x is None else x.detach() for x in map(arguments.get, names))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scripted_module_gives_the_same_values_and_gradients(case: Case) -> None:
    module, arguments = ours(case.build()), case.inputs()
    scripted = torch.jit.script(module)
    torch.testing.assert_close(results(scripted, detached(arguments)), results(module, arguments))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_scripted_module_holds_the_operator_and_survives_saving(case: Case) -> None:
    module, arguments = ours(case.build()), case.inputs()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    graph = loaded.inlined_graph  # a name of its own: it must outlive its nodes
    assert graph.findAllNodes("torch_attn::attention", recurse=True)
    before = torch.ops.torch_attn.kernel_calls()
    torch.testing.assert_close(loaded(**arguments), module(**arguments))
    assert torch.ops.torch_attn.kernel_calls() == before + 2


def test_scripted_module_follows_train_and_eval() -> None:
    module = torch.jit.script(torch_attn.MultiheadAttention(EMBED_DIM, HEADS, dropout=0.5, batch_first=True))
    x = torch.randn(BATCH, QUERY_LENGTH, EMBED_DIM)
    _, weights = module(x, x, x, average_attn_weights=False)
    assert (weights == 0).any()
    _, weights = module.eval()(x, x, x, average_attn_weights=False)
    assert not (weights == 0).any()


def test_scripted_module_raises_the_errors_of_the_eager_one() -> None:
    module = torch.jit.script(torch_attn.MultiheadAttention(EMBED_DIM, HEADS))
    x = torch.randn(QUERY_LENGTH, BATCH, EMBED_DIM)
    with pytest.raises(torch.jit.Error, match="Need attn_mask if specifying the is_causal hint"):
        module(x, x, x, is_causal=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_traced_module_gives_the_same_values(case: Case) -> None:
    arguments = case.inputs()
    caller = Caller(ours(case.build()), arguments)
    inputs = {n: x.detach() for n, x in arguments.items() if isinstance(x, Tensor)}
    traced = torch.jit.trace(caller, example_kwarg_inputs=inputs)
    torch.testing.assert_close(traced(**inputs), caller(**inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_graph_break(case: Case) -> None:
    module, arguments = ours(case.build()), case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = {f"module.{n}": x for n, x in results(module, arguments).items()}
    actual = {f"module.{n}": x for n, x in results(compiled, detached(arguments)).items()}
    renamed = {n.replace("grad__orig_mod.", "grad_"): x for n, x in actual.items()}
    torch.testing.assert_close(renamed, expected)


@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_exports_with_dynamic_batch_and_lengths(weights: str) -> None:
    case = Case("batch_first", "cross", "none", "bool", weights)
    arguments = case.inputs()
    caller = Caller(ours(case.build()).eval(), arguments)
    batch, length, key_length = (torch.export.Dim(name, min=2) for name in ("batch", "length", "key_length"))
    keys = {0: batch, 1: key_length}
    shapes = {"query": {0: batch, 1: length}, "key": keys, "value": keys, "attn_mask": None, "key_padding_mask": keys}
    program = torch.export.export(caller, tensors(arguments), dynamic_shapes=shapes)
    longer = torch.randn(2, 11, EMBED_DIM, dtype=torch.float64)
    inputs = (longer[:, :4], longer, longer, None, torch.rand(2, 11) > 0.5)
    torch.testing.assert_close(program.module()(*inputs), caller(*inputs))


def test_functional_transforms_see_through_the_module() -> None:
    """Gradients per sample, by torch.func, are those of one sample at a time."""
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64)
    parameters = {n: x.detach() for n, x in module.named_parameters()}
    x = torch.randn(BATCH, QUERY_LENGTH, EMBED_DIM, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        out, weights = torch.func.functional_call(module, parameters, (sample, sample, sample))
        return out.square().sum() + weights.square().sum()

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(loss(dict(module.named_parameters()), sample), list(module.parameters()))
        for (name, _), gradient in zip(module.named_parameters(), expected, strict=True):
            torch.testing.assert_close(actual[name][index], gradient)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_vmap_over_masks_alone_is_a_loop_over_them(kind: str) -> None:
    case = Case("batch_first", "self", kind)
    module, arguments = ours(case.build()), case.inputs()
    masks = torch.stack([case.inputs()["attn_mask"] for _ in range(3)])
    actual = torch.func.vmap(lambda mask: module(**{**arguments, "attn_mask": mask}))(masks)
    for index, mask in enumerate(masks):
        out, weights = module(**{**arguments, "attn_mask": mask})
        torch.testing.assert_close((actual[0][index], actual[1][index]), (out, weights))


def test_second_derivatives_are_those_of_finite_differences() -> None:
    module = ours(Case("bias_kv").build())

    def call(x: Tensor, mask: Tensor) -> Any:
        return module(x, x, x, attn_mask=mask)

    x = torch.randn(2, 1, EMBED_DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, mask))
    assert torch.autograd.gradgradcheck(call, (x, mask))


class KernelArguments(TorchDispatchMode):
    """Records what reaches torch_attn::attention_forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.torch_attn.attention_forward.default:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["plain", "batch_first"])
def test_self_attention_hands_the_kernel_views_of_one_projection(name: str) -> None:
    case = Case(name, weights="no_weights")
    with KernelArguments() as recorded:
        ours(case.build())(**case.inputs())
    ((q, k, v), _) = recorded.calls[0]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert q.untyped_storage().nbytes() == 3 * q.numel() * q.element_size()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_key_padding_mask_reaches_the_kernel_unexpanded(kind: str) -> None:
    case = Case("batch_first", "self", "none", kind, "no_weights")
    arguments = case.inputs()
    with KernelArguments() as recorded:
        ours(case.build())(**arguments)
    mask = recorded.calls[0][1]["attn_mask"]
    assert mask.shape == (BATCH, 1, 1, QUERY_LENGTH)
    assert mask.dtype == arguments["key_padding_mask"].dtype


@pytest.mark.parametrize("padding", ["none", "bool"])
def test_causal_hint_reaches_the_kernel_instead_of_the_mask(padding: str) -> None:
    case = Case("batch_first", "self", "causal", padding, "no_weights")
    with KernelArguments() as recorded:
        ours(case.build())(**case.inputs())
    options = recorded.calls[0][1]
    assert options["is_causal"]
    mask = options.get("attn_mask")
    assert (mask is None) if padding == "none" else (mask.shape == (BATCH, 1, 1, QUERY_LENGTH))
