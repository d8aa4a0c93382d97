"""Models that hold nn.MultiheadAttention, of PyTorch, torchvision and open_clip: replaced, they train to the same
losses, script, trace and export to our operator, and come back by restore_mha."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from torch_attn import replace_mha, restore_mha

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:'norm' was found in ScriptModule constants"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but"),
]

BATCH, LENGTH, WIDTH, CLASSES, WORDS, STEPS = 3, 6, 16, 5, 20, 5
SIZES = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}


class Translator(nn.Module):
    """nn.Transformer, causal in its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.transformer = nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, **SIZES)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = torch.ones(target.size(1), target.size(1), dtype=torch.bool).triu(1)
        # Said, because left to find out whether a mask is causal, nn.TransformerDecoder cannot be exported.
        x = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        return self.head(x)


class Classifier(nn.Module):
    """nn.TransformerEncoder over padded sequences: word 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(activation="gelu", norm_first=True, **SIZES)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        padding = words == 0
        x = self.encoder(self.embedding(words), src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding.unsqueeze(2), 0.0).mean(1))


class Captioner(nn.Module):
    """nn.TransformerDecoder from features, as an image's, to words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES), 2)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, features: Tensor, words: Tensor) -> Tensor:
        mask = torch.full((words.size(1), words.size(1)), float("-inf"), dtype=features.dtype).triu(1)
        return self.head(self.decoder(self.embedding(words), features, tgt_mask=mask, tgt_is_causal=True))


def torchvision_vit() -> nn.Module:
    vit = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=WIDTH, mlp_dim=32, num_classes=CLASSES
    )
    nn.init.normal_(vit.heads.head.weight, std=0.1)  # zero at first, which would stop the gradient for a step
    return vit


def clip() -> nn.Module:
    vision = open_clip.CLIPVisionCfg(
        layers=2,
        width=WIDTH,
        head_width=8,
        patch_size=8,
        image_size=16,
        attentional_pool=True,
        attn_pooler_queries=4,
        attn_pooler_heads=2,
    )
    text = open_clip.CLIPTextCfg(context_length=LENGTH, vocab_size=WORDS, width=WIDTH, heads=2, layers=2)
    return open_clip.CLIP(WIDTH, vision, text)


def words(length: int = LENGTH) -> Tensor:
    return torch.randint(1, WORDS, (BATCH, length))


def padded_words() -> Tensor:
    found = words()
    found[1, 2:] = 0
    return found


def images() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)


def of_words(logits: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), arguments[1].roll(-1, 1).flatten())


def of_classes(logits: Tensor, arguments: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(logits, torch.arange(BATCH) % CLASSES)


def contrastive(found: tuple[Tensor, Tensor, Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
    image, text, scale = found
    return F.cross_entropy(scale * image @ text.T, torch.arange(BATCH))


@dataclass(frozen=True)
class Model:
    """``calls`` is how often one forward pass runs attention."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    calls: int
    loss: Callable[[Any, tuple[Tensor, ...]], Tensor]

    def make(self) -> nn.Module:
        return self.build().double()


MODELS: dict[str, Model] = {
    "nn.Transformer": Model(Translator, lambda: (words(), words(4)), 6, of_words),
    "nn.TransformerEncoder": Model(Classifier, lambda: (padded_words(),), 2, of_classes),
    "nn.TransformerDecoder": Model(
        Captioner, lambda: (torch.randn(BATCH, 4, WIDTH, dtype=torch.float64), words()), 4, of_words
    ),
    "torchvision": Model(torchvision_vit, lambda: (images(),), 2, of_classes),
    "open_clip": Model(clip, lambda: (images(), words()), 5, contrastive),
}


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


def assert_runs_our_kernels(case: Model, program: Callable[..., Any], theirs: nn.Module) -> None:
    """On inputs that the program was not made from."""
    arguments = case.inputs()
    with torch.no_grad():
        expected = theirs(*arguments)
        before = kernel_calls()
        actual = program(*arguments)
    assert kernel_calls() - before == case.calls
    assert_close(actual, expected)


def losses(case: Model, model: nn.Module, arguments: tuple[Tensor, ...]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for _ in range(STEPS):
        loss = case.loss(model(*arguments), arguments)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model_trains_to_the_same_losses(name: str) -> None:
    case = MODELS[name]
    theirs, arguments = case.make(), case.inputs()
    mine = replace_mha(copy.deepcopy(theirs))
    expected = losses(case, theirs, arguments)
    before = kernel_calls()
    actual = losses(case, mine, arguments)
    assert kernel_calls() - before == STEPS * case.calls
    assert_close(actual, expected, rtol=1e-9, atol=0)
    assert len({round(x, 4) for x in actual}) == STEPS, "it must have learned something"
    assert_close(mine.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model_is_scripted(name: str, training: bool) -> None:
    case = MODELS[name]
    theirs = case.make().train(training)
    assert_runs_our_kernels(case, torch.jit.script(replace_mha(copy.deepcopy(theirs))), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model_is_traced(name: str) -> None:
    case = MODELS[name]
    theirs = case.make().eval()
    program = torch.jit.trace(replace_mha(copy.deepcopy(theirs)), case.inputs(), check_trace=False)
    assert_runs_our_kernels(case, program, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_replaced_model_is_exported(name: str) -> None:
    case = MODELS[name]
    theirs = case.make().eval()
    program = torch.export.export(replace_mha(copy.deepcopy(theirs)), case.inputs())
    assert_runs_our_kernels(case, program.module(), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_restored_model_is_the_one_it_was(name: str) -> None:
    case = MODELS[name]
    model, arguments = case.make().eval(), case.inputs()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with torch.no_grad():
        expected = model(*arguments)
        replace_mha(model)
        assert_runs_our_kernels(case, model, restore_mha(copy.deepcopy(model)))
        restore_mha(model)
        before = kernel_calls()
        actual = model(*arguments)
    assert kernel_calls() == before
    assert_close(actual, expected, rtol=0, atol=0)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
