"""PyTorch's transformer modules with their attention replaced: same results, and the kernel really called, in training,
evaluation, inference and TorchScript, where nn.TransformerEncoderLayer has a fast path past its attention module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_attn import replace_mha, restore_mha

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:'norm' was found in ScriptModule constants"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
]

D, HEADS, FEEDFORWARD, LAYERS = 16, 2, 32, 2
BATCH, LENGTH, TARGET_LENGTH = 3, 6, 5
MODES: dict[str, tuple[bool, Callable[[], Any]]] = {  # training, gradient mode
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}
LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"batch_first": True},
    "gelu_norm_first": {"batch_first": True, "norm_first": True, "activation": "gelu"},
    "length_first": {},
    "no_bias": {"batch_first": True, "bias": False},
}


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(D, HEADS, FEEDFORWARD, 0.0, dtype=torch.float64, **options)


def encoder(**options: Any) -> nn.TransformerEncoder:
    norm = nn.LayerNorm(D, dtype=torch.float64)
    return nn.TransformerEncoder(encoder_layer(**options), LAYERS, norm)


def decoder_layer(**options: Any) -> nn.TransformerDecoderLayer:
    return nn.TransformerDecoderLayer(D, HEADS, FEEDFORWARD, 0.0, dtype=torch.float64, **options)


def transformer(**options: Any) -> nn.Transformer:
    return nn.Transformer(D, HEADS, LAYERS, LAYERS, FEEDFORWARD, 0.0, dtype=torch.float64, **options)


MODELS: dict[str, tuple[Callable[..., nn.Module], int]] = {  # and the attention modules each call runs
    "TransformerEncoderLayer": (encoder_layer, 1),
    "TransformerEncoder": (encoder, LAYERS),
    "TransformerDecoderLayer": (decoder_layer, 2),
    "Transformer": (transformer, 3 * LAYERS),
}


def sequence(length: int, options: dict[str, Any]) -> Tensor:
    x = torch.randn(BATCH, length, D, dtype=torch.float64)
    return x if options.get("batch_first") else x.transpose(0, 1).contiguous()


def padding() -> Tensor:
    """True at the end of all sequences but the longest, which is what nn.TransformerEncoder nests."""
    return torch.arange(LENGTH) >= torch.tensor([LENGTH, 2, 4]).unsqueeze(1)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def arguments(model: str, options: dict[str, Any], masks: str) -> dict[str, Any]:
    src, tgt = sequence(LENGTH, options), sequence(TARGET_LENGTH, options)
    names = {
        "TransformerEncoderLayer": ({"src": src}, "src_mask", "src_key_padding_mask"),
        "TransformerEncoder": ({"src": src}, "mask", "src_key_padding_mask"),
        "TransformerDecoderLayer": ({"tgt": tgt, "memory": src}, "tgt_mask", "memory_key_padding_mask"),
        "Transformer": ({"src": src, "tgt": tgt}, "tgt_mask", "src_key_padding_mask"),
    }
    call, mask_name, padding_name = names[model]
    if "causal" in masks:
        call[mask_name] = causal(LENGTH if "src" in mask_name or mask_name == "mask" else TARGET_LENGTH)
    if "padding" in masks:
        call[padding_name] = padding()
    return call


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


@pytest.mark.parametrize("masks", ["no_mask", "padding", "causal", "causal_padding"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_replaced_model_gives_the_same_output_through_the_kernel(
    model: str, options: dict[str, Any], mode: str, masks: str
) -> None:
    make, calls = MODELS[model]
    training, grad_mode = MODES[mode]
    theirs = make(**options).train(training)
    mine = replace_mha(copy.deepcopy(theirs))
    call = arguments(model, options, masks)
    with grad_mode():
        expected = theirs(**call)
        before = kernel_calls()
        actual = mine(**call)
    assert kernel_calls() == before + calls
    torch.testing.assert_close(actual, expected)
    if mode == "train":
        parameters = list(mine.parameters())
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, parameters, cotangent, allow_unused=True),
            torch.autograd.grad(expected, list(theirs.parameters()), cotangent, allow_unused=True),
        )


@pytest.mark.parametrize("model", MODELS)
def test_scripted_model_gives_the_same_output_through_the_kernel(model: str) -> None:
    make, calls = MODELS[model]
    options = LAYER_OPTIONS["relu"]
    theirs = make(**options)
    scripted = torch.jit.script(replace_mha(copy.deepcopy(theirs)))
    for training, grad_mode in MODES.values():
        theirs.train(training)
        scripted.train(training)
        for masks in ("no_mask", "padding", "causal"):
            call = arguments(model, options, masks)
            with grad_mode():
                expected = theirs(**call)
                before = kernel_calls()
                actual = scripted(**call)
            assert kernel_calls() == before + calls
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("nested", [True, False])
def test_padded_positions_are_zero_where_the_encoder_nests(nested: bool) -> None:
    """nn.TransformerEncoder packs a padded batch into a NestedTensor in inference, and pads the result with zeros."""
    stack = nn.TransformerEncoder(encoder_layer(batch_first=True), LAYERS, enable_nested_tensor=nested).eval()
    mine = replace_mha(stack)
    with torch.no_grad():
        out = mine(sequence(LENGTH, {"batch_first": True}), src_key_padding_mask=padding())
    assert (out[padding()] == 0).all().item() is nested


def test_a_fully_padded_sequence_gives_no_nan() -> None:
    mine = replace_mha(nn.TransformerEncoder(encoder_layer(batch_first=True), LAYERS, enable_nested_tensor=False))
    mask = padding()
    mask[1] = True
    for training in (True, False):
        assert mine.train(training)(sequence(LENGTH, {"batch_first": True}), src_key_padding_mask=mask).isfinite().all()


def test_an_encoder_built_from_a_replaced_layer_calls_the_kernel() -> None:
    stack = nn.TransformerEncoder(replace_mha(encoder_layer(batch_first=True)), LAYERS).eval()
    before = kernel_calls()
    with torch.no_grad():
        stack(sequence(LENGTH, {"batch_first": True}))
    assert kernel_calls() == before + LAYERS


def test_a_layer_whose_module_was_set_by_hand_is_served_by_replace_mha() -> None:
    """Set by hand alone, the layer's fast path would read the weights past it."""
    layer = encoder_layer(batch_first=True).eval()
    replace_mha(layer.self_attn)
    x = sequence(LENGTH, {"batch_first": True})
    with torch.no_grad():
        before = kernel_calls()
        layer(x)
        assert kernel_calls() == before
        replace_mha(layer)(x)
        assert kernel_calls() == before + 1


@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh], ids=["relu", "gelu", "tanh"])
def test_restored_layer_has_its_fast_path_back(activation: Any) -> None:
    layer = encoder_layer(batch_first=True, activation=activation)
    before = layer.activation_relu_or_gelu
    attributes = list(vars(layer))
    assert replace_mha(layer).activation_relu_or_gelu == 0
    assert restore_mha(layer).activation_relu_or_gelu == before
    assert list(vars(layer)) == attributes


def test_the_global_fast_path_switch_is_not_touched() -> None:
    replace_mha(encoder_layer(batch_first=True))
    assert torch.backends.mha.get_fastpath_enabled()


def test_replaced_encoder_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    mine = replace_mha(encoder(batch_first=True)).eval()
    x = sequence(LENGTH, {"batch_first": True})
    with torch.no_grad():
        expected = mine(x, src_key_padding_mask=padding())
        compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
        actual = compiled(x, src_key_padding_mask=padding())
    visible = ~padding()
    torch.testing.assert_close(actual[visible], expected[visible])


def test_replaced_transformer_trains_under_autocast() -> None:
    torch.manual_seed(0)
    mine = replace_mha(transformer(batch_first=True)).float()
    src, tgt = sequence(LENGTH, {"batch_first": True}).float(), sequence(TARGET_LENGTH, {"batch_first": True}).float()
    exact = mine(src, tgt)
    with torch.autocast("cpu", torch.bfloat16):
        out = mine(src, tgt)
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.parameters())
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)
