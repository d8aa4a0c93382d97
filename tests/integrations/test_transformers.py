"""model.set_attn_implementation("torch_attn") computes what "eager" does, on our kernels."""

from __future__ import annotations

import fnmatch
import runpy
import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torch_attn
import torch_attn.integrations.transformers
from torch_attn.integrations.transformers import attention_forward, register

from .models import BATCH, LENGTH, MODELS, VOCABULARY, Model, padding

PADDED = [name for name, model in MODELS.items() if model.padded is not None]
GENERATORS = [name for name, model in MODELS.items() if model.generates]
STEPS = 8


# What transformers and torch.jit.trace say of themselves.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


def valid(case: Model, out: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    """The output where it is defined: a padded position attends nothing, or whatever eager makes of that."""
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = arguments.get(name)
        if mask is not None and mask.shape == out.shape[:2]:
            return out[mask.bool()]
    return out


def results(
    case: Model, model: transformers.PreTrainedModel, arguments: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    out = valid(case, model(**arguments)[case.output], arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    leaves = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((out * cotangent).sum(), leaves, allow_unused=True)
    return out.detach(), [g for g in gradients if g is not None]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within ``tolerance`` of the largest of all of them: some gradients are 0 but for rounding."""
    largest = max(x.abs().max().item() for x in expected)
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("name,padded", [(n, False) for n in MODELS] + [(n, True) for n in PADDED])
def test_outputs_and_gradients_equal_eagers(name: str, padded: bool) -> None:
    case = MODELS[name]
    model, arguments = case.make("eager"), case.arguments(padded)
    calls = kernel_calls()
    expected, expected_gradients = results(case, model, arguments)
    assert kernel_calls() == calls, "eager must not use our kernels"

    model.set_attn_implementation("torch_attn")
    out, gradients = results(case, model, arguments)
    assert kernel_calls() - calls == case.calls
    assert_close([out], [expected], case.tolerance)
    assert_close(gradients, expected_gradients, 10 * case.tolerance)


class Spy(TorchDispatchMode):
    """Keeps the mask of every attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor | None] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn.attention_forward.default:
            self.masks.append(kwargs.get("attn_mask"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in PADDED if name != "t5"])
def test_padding_masks_stay_boolean(name: str) -> None:
    case = MODELS[name]
    with Spy() as spy, torch.no_grad():
        case.make()(**case.arguments(padded=True))
    masks = [mask for mask in spy.masks if mask is not None]
    assert masks
    assert all(mask.dtype == torch.bool for mask in masks)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_without_padding_no_mask_is_made(name: str) -> None:
    case = MODELS[name]
    with Spy() as spy, torch.no_grad():
        case.make()(**case.arguments())
    assert spy.masks == [None] * case.calls


def generate(
    model: transformers.PreTrainedModel, arguments: dict[str, Tensor], cache: str
) -> tuple[list[list[int]], list[Tensor]]:
    """The tokens, and the logits of each step."""
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    generated = model.generate(
        **{name: x for name, x in arguments.items() if name != "decoder_input_ids"},
        **options,
        do_sample=False,
        min_new_tokens=STEPS,
        max_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return generated.sequences.tolist(), list(generated.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_generation_matches_token_by_token(name: str, padded: bool, cache: str) -> None:
    case = MODELS[name]
    torch.manual_seed(1)  # fixed, as two tokens whose logits are equal to rounding may change places
    model, arguments = case.make("eager").eval(), case.arguments(padded)
    expected_tokens, expected_logits = generate(model, arguments, cache)

    model.set_attn_implementation("torch_attn")
    calls = kernel_calls()
    tokens, logits = generate(model, arguments, cache)
    assert kernel_calls() - calls >= STEPS * model.config.num_hidden_layers
    assert tokens == expected_tokens
    assert len(logits) == STEPS
    assert_close(logits, expected_logits, case.tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_output_attentions_are_eagers_maps(name: str) -> None:
    case = MODELS[name]
    model, arguments = case.make("eager").eval(), case.arguments()
    expected = model(**arguments, output_attentions=True)
    model.set_attn_implementation("torch_attn")
    calls = kernel_calls()
    actual = model(**arguments, output_attentions=True)
    assert kernel_calls() - calls >= case.calls
    expected_maps = case.maps(expected)
    for field, maps in case.maps(actual).items():
        assert len(maps) == len(expected_maps[field]) > 0
        for x, y in zip(maps, expected_maps[field], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=case.tolerance)
    torch.testing.assert_close(actual[case.output], model(**arguments)[case.output])


def test_maps_carry_gradients() -> None:
    case = MODELS["bert"]
    model, arguments = case.make("eager"), case.arguments()
    gradients = []
    for implementation in ("eager", "torch_attn"):
        model.set_attn_implementation(implementation)
        first = model(**arguments, output_attentions=True).attentions[0]
        (gradient,) = torch.autograd.grad(first[..., 0].square().sum(), model.embeddings.word_embeddings.weight)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-10 * gradients[0].abs().max().item())


@pytest.mark.parametrize("name", ["bert", "gemma2", "gpt_oss", "t5"])
def test_record_attention_collects_the_same_maps(name: str) -> None:
    case = MODELS[name]
    model, arguments = case.make().eval(), case.arguments(case.padded is not None)
    with torch.no_grad():
        expected = model(**arguments, output_attentions=True)
        plain = model(**arguments)[case.output]
        with torch_attn.record_attention(model) as record:
            recorded = model(**arguments)[case.output]
    assert torch.equal(recorded, plain)
    assert len(record.layers) == case.calls
    by_field = {
        "encoder_attentions": "encoder.*.SelfAttention",
        "decoder_attentions": "decoder.*.SelfAttention",
        "cross_attentions": "*.EncDecAttention",
    }
    for field in case.attentions:
        names = fnmatch.filter(record.layers, by_field.get(field, "*"))
        for layer, weights in zip(names, expected[field], strict=True):
            torch.testing.assert_close(record.maps[layer][0], weights)


def test_record_attention_follows_generation() -> None:
    case = MODELS["llama"]
    model, arguments = case.make().eval(), case.arguments()
    with torch_attn.record_attention(model, layers=0) as record:
        generate(model, arguments, "dynamic")
    (maps,) = record.maps.values()
    lengths = [(LENGTH, LENGTH)] + [(1, LENGTH + step) for step in range(1, STEPS)]
    assert [x.shape for x in maps] == [(BATCH, 4, *sizes) for sizes in lengths]


class OneOutput(torch.nn.Module):
    """The model as a function of tensors to a tensor, which is what every compiler takes."""

    def __init__(self, case: Model, names: Iterable[str]) -> None:
        super().__init__()
        self.case = case
        self.names = tuple(names)
        self.model = case.make().eval()
        self.options = {"use_cache": False} if case.generates else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        arguments = dict(zip(self.names, inputs, strict=True))
        return self.model(**arguments, **self.options)[self.case.output]


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_holds_our_operator(name: str) -> None:
    case = MODELS[name]
    arguments = case.arguments(case.padded is not None)
    model = OneOutput(case, arguments)
    example, other = tuple(arguments.values()), tuple(case.arguments(case.padded is not None).values())
    with torch.no_grad():
        traced = torch.jit.trace(model, example, check_trace=False)
        calls = kernel_calls()
        actual = traced(*other)
        assert kernel_calls() - calls == case.calls
        torch.testing.assert_close(actual, model(*other))


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_holds_our_operator(name: str) -> None:
    case = MODELS[name]
    arguments = case.arguments(case.padded is not None)
    model = OneOutput(case, arguments)
    example, other = tuple(arguments.values()), tuple(case.arguments(case.padded is not None).values())
    with torch.no_grad():
        program = torch.export.export(model, example, strict=False)
        targets = [str(node.target) for node in program.graph.nodes]
        assert sum(target.startswith("torch_attn.attention") for target in targets) == case.calls
        calls = kernel_calls()
        actual = program.module()(*other)
        assert kernel_calls() - calls == case.calls
        torch.testing.assert_close(actual, model(*other))


def test_an_exported_sequence_length_is_dynamic() -> None:
    case = MODELS["llama"]
    model = case.make().eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = {**case.arguments(padded=True), "use_cache": False}
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
        other = {
            "input_ids": torch.randint(2, VOCABULARY, (BATCH, LENGTH + 4)),
            "attention_mask": padding(left=True, length=LENGTH + 4),
            "use_cache": False,
        }
        actual, expected = program.module()(**other).logits, model(**other).logits
        torch.testing.assert_close(actual, expected)


def test_a_compiled_model_has_no_graph_break() -> None:
    case = MODELS["llama"]
    model, arguments = case.make().eval(), {**case.arguments(), "use_cache": False}
    with torch.no_grad():
        expected = model(**arguments).logits
        calls = kernel_calls()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**arguments).logits, expected)
        assert kernel_calls() - calls == case.calls


def layer(**attributes: object) -> SimpleNamespace:
    return SimpleNamespace(is_causal=False, **attributes)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64, None])
@pytest.mark.parametrize("causal", [False, True])
def test_a_position_bias_joins_any_mask(mask_dtype: torch.dtype | None, causal: bool) -> None:
    query, key, value = (torch.randn(BATCH, 4, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 4, LENGTH, LENGTH, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.4
    allowed[..., 0] = True
    mask, additive = None, torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.float64)
    if mask_dtype is not None:
        additive = additive.masked_fill(~allowed, float("-inf"))
        mask = allowed if mask_dtype == torch.bool else additive
    elif causal:  # a missing mask is what stands for the causal one
        additive = additive.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
    out, weights = attention_forward(
        layer(), query, key, value, mask, scaling=1.0, is_causal=causal, position_bias=bias
    )
    assert weights is None
    reference = torch.softmax(query @ key.mT + bias + additive, -1) @ value
    torch.testing.assert_close(out, reference.transpose(1, 2))
    cotangent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, bias, cotangent)
    (expected,) = torch.autograd.grad(reference.transpose(1, 2), bias, cotangent)
    torch.testing.assert_close(gradient, expected)


def test_dropout_reaches_the_kernel() -> None:
    x = torch.randn(BATCH, 4, LENGTH, 8)
    assert attention_forward(layer(), x, x, x, None)[0].any()
    assert not attention_forward(layer(), x, x, x, None, dropout=1.0)[0].any()


@pytest.mark.parametrize("argument", ["cache", "indices", "block_indices", "sinks"])
def test_what_is_not_served_is_refused(argument: str) -> None:
    x = torch.randn(BATCH, 4, LENGTH, 8)
    with pytest.raises(ValueError, match=f"SimpleNamespace passes {argument}: .* does not serve"):
        attention_forward(layer(), x, x, x, None, **{argument: x})
    attention_forward(layer(), x, x, x, None, **{argument: None})


def test_registering_twice_changes_nothing() -> None:
    register()
    assert transformers.AttentionInterface()["torch_attn"] is attention_forward


def test_a_transformers_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torchvision that was built for another torch: transformers' own error does not name it."""

    def fail(name: str) -> None:
        raise ModuleNotFoundError(f"Could not import module '{name}'") from RuntimeError("torchvision::nms is missing")

    broken = ModuleType("transformers")
    broken.__getattr__ = fail
    monkeypatch.setitem(sys.modules, "transformers", broken)
    with pytest.raises(ImportError, match="needs transformers 5.23 .* failed: torchvision::nms is missing"):
        runpy.run_path(torch_attn.integrations.transformers.__file__)
