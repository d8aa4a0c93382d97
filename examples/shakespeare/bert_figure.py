"""Draws where every head of the masked model looks from a masked word: to both sides of it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import torch_attn
from bert_model import MASK, MaskedModel
from plays import Plays

matplotlib.use("Agg")  # draws into a file, so no screen is needed

SENTENCE = "I have given suck, and know\nHow tender 'tis to love the[MASK] that milks me"  # Macbeth, act 1, scene 7


def answers(model: MaskedModel, tokens: Tensor, plays: Plays, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest tokens for the one that is masked in (1, length), with their probabilities."""
    with torch.no_grad():
        shares, numbers = model(tokens)[tokens == MASK].softmax(-1)[0].topk(count)
    return list(zip(plays.pieces(numbers), shares.tolist(), strict=True))


def looks_from_the_mask(model: MaskedModel, tokens: Tensor) -> Tensor:
    """(layers * heads, length): the weights of the masked token's row, a row a head."""
    with torch.no_grad(), torch_attn.record_attention(model) as record:
        model(tokens)
    return torch.cat([layer[0, :, int((tokens == MASK).nonzero()[0, 1])] for layer in record.last_maps()])


def draw(model: MaskedModel, plays: Plays, sentence: str, file: Path, style: str = "light") -> None:
    tokens = plays.encode(sentence)
    weights = looks_from_the_mask(model, tokens)
    layers = len(model.encoder.layers)
    heads = [
        f"layer {1 + row * layers // len(weights)}, head {1 + row % (len(weights) // layers)}"
        for row in range(len(weights))
    ]
    best = ", ".join(f"“{word.strip()}” {share:.0%}" for word, share in answers(model, tokens, plays, 3))
    figure = torch_attn.plot.heatmap(
        weights,
        heads,
        key_tokens=["[?]" if piece == "[MASK]" else piece for piece in plays.pieces(tokens[0])],
        title=f"[?] is, the model says: {best}",
        query_label="heads, looking from [?]",
        key_label="to these tokens",
        style=style,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
