"""Small transformers models with random weights, one for each way in which its models use attention, and their inputs;
the one list that test_transformers.py is parametrised from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
import transformers as t
from torch import Tensor

BATCH, LENGTH, VOCABULARY = 2, 9, 50
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **TOKENS,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Model:
    """``calls`` is how often one forward pass runs attention, ``output`` the field of the result to compare, and
    ``attentions`` the fields that hold maps, in the order of the layers. Where eager takes its softmax in float32 the
    tolerance is float32's. ``generates``: the model has ``generate()``."""

    build: Callable[[], t.PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    calls: int
    output: str = "last_hidden_state"
    attentions: tuple[str, ...] = ("attentions",)
    padded: Callable[[], dict[str, Tensor]] | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    generates: bool = False

    def make(self, implementation: str = "torch_attn") -> t.PreTrainedModel:
        model = self.build().to(self.dtype)
        model.set_attn_implementation(implementation)
        return model

    def arguments(self, padded: bool = False) -> dict[str, Tensor]:
        given = self.padded if padded else self.inputs
        assert given is not None
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in given().items()}

    def maps(self, result: t.utils.ModelOutput) -> dict[str, tuple[Tensor, ...]]:
        return {field: attrgetter(field)(result) for field in self.attentions}


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCABULARY, (BATCH, length))


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def padding(left: bool, length: int = LENGTH) -> Tensor:
    """The second of two sequences is padded: (2, length), 1 where there is a token."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, slice(None, 3) if left else slice(-3, None)] = 0
    return mask


def padded_left() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": padding(left=True)}


def padded_right() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": padding(left=False)}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 64, 64)}


def padded_images() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, 64, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    return {**images(), "pixel_mask": mask}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def two_texts_padded() -> dict[str, Tensor]:
    return {**padded_right(), "decoder_input_ids": tokens(5)}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 20), "decoder_input_ids": tokens(5)}


def speech_padded() -> dict[str, Tensor]:
    """What is padded is the decoder's text, on the left; speech is padded with silence, which is attended."""
    return {**speech(), "decoder_attention_mask": padding(left=True, length=5)}


def text_and_pixels() -> dict[str, Tensor]:
    return {**text(), **pixels()}


def text_and_pixels_padded() -> dict[str, Tensor]:
    return {**padded_right(), **pixels()}


def clip() -> t.PreTrainedModel:
    return t.CLIPModel(
        t.CLIPConfig(
            text_config={**ENCODER, **TOKENS, "eos_token_id": 49, "max_position_embeddings": 16},
            vision_config={**ENCODER, **IMAGE},
            projection_dim=16,
        )
    )


def detr() -> t.PreTrainedModel:
    backbone = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return t.DetrModel(
        t.DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            backbone_config=backbone,
            use_pretrained_backbone=False,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=6,
            dropout=0.0,
        )
    )


def whisper() -> t.PreTrainedModel:
    return t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            **{**TOKENS, "eos_token_id": 1},
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=10,
            max_target_positions=40,
            decoder_start_token_id=2,
            dropout=0.0,
        )
    )


def t5() -> t.PreTrainedModel:
    return t.T5ForConditionalGeneration(
        t.T5Config(
            **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
        )
    )


def gemma2() -> t.PreTrainedModel:
    return t.Gemma2ForCausalLM(
        t.Gemma2Config(
            **DECODER,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
        )
    )


def gpt_oss() -> t.PreTrainedModel:
    return t.GptOssForCausalLM(
        t.GptOssConfig(
            **DECODER,
            num_local_experts=2,
            num_experts_per_tok=2,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


def gpt2() -> t.PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
    return t.GPT2LMHeadModel(t.GPT2Config(**TOKENS, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def bert() -> t.PreTrainedModel:
    return t.BertModel(t.BertConfig(**ENCODER, **NO_DROPOUT, **TOKENS, max_position_embeddings=16))


def vit() -> t.PreTrainedModel:
    return t.ViTModel(t.ViTConfig(**ENCODER, **IMAGE, **NO_DROPOUT))


def llama() -> t.PreTrainedModel:
    return t.LlamaForCausalLM(t.LlamaConfig(**DECODER))


def qwen3() -> t.PreTrainedModel:
    layers = ["full_attention", "sliding_attention"]
    return t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER, use_sliding_window=True, sliding_window=4, layer_types=layers))


def llama4() -> t.PreTrainedModel:
    return t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            **DECODER,
            intermediate_size_mlp=48,
            moe_layers=[],
            attention_chunk_size=4,
            layer_types=["chunked_attention", "full_attention"],
        )
    )


SEQ2SEQ = ("encoder_attentions", "decoder_attentions", "cross_attentions")
CLIP_MAPS = ("text_model_output.attentions", "vision_model_output.attentions")
# A language model whose eager attention takes its softmax in float32.
LANGUAGE = {"output": "logits", "padded": padded_left, "dtype": torch.float32, "tolerance": 2e-5, "generates": True}
MODELS: dict[str, Model] = {
    "bert": Model(bert, text, 2, padded=padded_right),
    "vit": Model(vit, pixels, 2, tolerance=2e-5),
    "clip": Model(clip, text_and_pixels, 4, "logits_per_image", CLIP_MAPS, text_and_pixels_padded, tolerance=2e-5),
    "detr": Model(detr, images, 6, attentions=SEQ2SEQ, padded=padded_images),
    "gpt2": Model(gpt2, text, 2, "logits", padded=padded_left, generates=True),
    "llama": Model(llama, text, 2, **LANGUAGE),
    "llama4": Model(llama4, text, 2, **LANGUAGE),
    "qwen3": Model(qwen3, text, 2, **LANGUAGE),
    "gemma2": Model(gemma2, text, 2, **LANGUAGE),
    "gpt_oss": Model(gpt_oss, text, 2, **LANGUAGE),
    "t5": Model(t5, two_texts, 6, "logits", SEQ2SEQ, two_texts_padded, generates=True),
    "whisper": Model(whisper, speech, 6, "logits", SEQ2SEQ, speech_padded, generates=True),
}
