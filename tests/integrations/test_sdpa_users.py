"""Models that call F.scaled_dot_product_attention, of timm, x-transformers and transformers: inside patch_sdpa they
compute the same on our kernels. What patch_sdpa does by itself is tested in tests/test_sdpa.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.testing import assert_close
from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

from torch_attn import patch_sdpa

from . import models

BATCH, LENGTH, WIDTH, WORDS = 2, 9, 16, 20
IMAGE = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 5}
LAYERS = {"dim": WIDTH, "depth": 2, "heads": 2, "attn_dim_head": 8, "attn_flash": True}


def language_model(layers: type[nn.Module], **options: Any) -> nn.Module:
    return TransformerWrapper(num_tokens=WORDS, max_seq_len=LENGTH, attn_layers=layers(**LAYERS, **options))


def image_model() -> nn.Module:
    return ViTransformerWrapper(image_size=16, patch_size=8, num_classes=5, attn_layers=Encoder(**LAYERS))


def bert() -> nn.Module:
    model = models.bert()
    model.set_attn_implementation("sdpa")
    return model


def images() -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, 16, 16, dtype=torch.float64),)


def words() -> tuple[Tensor, ...]:
    return (torch.randint(0, WORDS, (BATCH, LENGTH)),)


def padding() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    return {"mask": mask}


def context() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, 4, dtype=torch.bool)
    mask[0, 3:] = False
    return {"context": torch.randn(BATCH, 4, WIDTH, dtype=torch.float64), "context_mask": mask}


@dataclass(frozen=True)
class Model:
    """``calls`` is how often one forward pass runs attention."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    options: Callable[[], dict[str, Tensor]] = field(default=dict)
    calls: int = 2

    def make(self) -> nn.Module:
        """In evaluation, as many of these models have dropout by default."""
        model = self.build().double().eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)  # zero at first, which would hide what is before it
        return model


MODELS: dict[str, Model] = {
    "timm_vit": Model(lambda: VisionTransformer(**IMAGE, qk_norm=True), images),
    "timm_eva_with_rotary_positions": Model(lambda: Eva(**IMAGE, use_rot_pos_emb=True, ref_feat_shape=(2, 2)), images),
    "timm_beit_with_position_bias": Model(lambda: Beit(**IMAGE, use_rel_pos_bias=True), images),
    "timm_vit_with_relative_positions": Model(lambda: VisionTransformerRelPos(**IMAGE), images),
    "x_decoder": Model(lambda: language_model(Decoder), words),
    "x_decoder_padded": Model(lambda: language_model(Decoder), words, padding),
    "x_decoder_with_alibi": Model(lambda: language_model(Decoder, alibi_pos_bias=True), words),
    "x_decoder_with_memory": Model(lambda: language_model(Decoder, attn_num_mem_kv=2), words),
    "x_decoder_with_one_key_head": Model(lambda: language_model(Decoder, attn_kv_heads=1), words),
    "x_decoder_with_cross_attention": Model(lambda: language_model(Decoder, cross_attend=True), words, context, 4),
    "x_encoder_padded": Model(lambda: language_model(Encoder), words, padding),
    "x_vit": Model(image_model, images),
    "transformers_bert": Model(bert, words, lambda: {"attention_mask": padding()["mask"].long()}),
}


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


def output(case: Model, model: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> Tensor:
    out = model(*arguments, **options)
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    mask = options.get("mask", options.get("attention_mask"))
    return out if mask is None else out[mask.bool()]


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    leaves = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [g for g in torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True) if g is not None]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_those_without_the_patch(name: str) -> None:
    case = MODELS[name]
    model, arguments, options = case.make(), case.inputs(), case.options()
    before = kernel_calls()
    expected = output(case, model, arguments, options)
    expected_gradients = gradients(model, expected)
    assert kernel_calls() == before
    with patch_sdpa() as patch:
        actual = output(case, model, arguments, options)
        actual_gradients = gradients(model, actual)
    assert patch.calls == kernel_calls() - before == case.calls
    assert patch.fallbacks == {}
    assert_close(actual, expected)
    largest = max(g.abs().max().item() for g in expected_gradients)
    assert len(actual_gradients) == len(expected_gradients)
    for x, y in zip(actual_gradients, expected_gradients, strict=True):
        assert_close(x, y, rtol=0, atol=1e-10 * largest)


def test_timms_checkpointing_recomputes_on_our_kernels() -> None:
    case = MODELS["timm_vit"]
    model, arguments = case.make().train(), case.inputs()
    expected = gradients(model, model(*arguments))
    model.set_grad_checkpointing()
    with patch_sdpa() as patch:
        actual = gradients(model, model(*arguments))
    assert patch.calls == 2 * case.calls
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["timm_vit", "x_decoder_padded"])
def test_a_model_exported_inside_holds_our_operator(name: str) -> None:
    case = MODELS[name]
    model, options = case.make(), case.options()
    with torch.no_grad():
        with patch_sdpa():
            program = torch.export.export(model, case.inputs(), options).module()
        arguments = case.inputs()
        before = kernel_calls()
        assert_close(program(*arguments, **options), model(*arguments, **options))
    assert kernel_calls() - before == case.calls


def test_a_compiled_model_is_patched_without_graph_break() -> None:
    torch._dynamo.reset()
    case = MODELS["timm_vit"]
    model, arguments = case.make(), case.inputs()
    expected = model(*arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = kernel_calls()
    with patch_sdpa():
        actual = compiled(*arguments)
        assert_close(gradients(model, actual), gradients(model, expected))
    assert kernel_calls() - before == case.calls
    assert_close(actual, expected)
