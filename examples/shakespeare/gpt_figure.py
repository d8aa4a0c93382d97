"""Finds the head that copies, and draws its map of a sentence of a play that training never saw."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor

import torch_attn
from gpt_model import GPT
from gpt_training import follows_again, windows
from plays import Plays

matplotlib.use("Agg")  # draws into a file, so no screen is needed

SENTENCE = "To-morrow, and to-morrow, and to-morrow,"  # Macbeth, act 5, scene 5


class CopyingHead(NamedTuple):
    layer: int
    head: int
    share: float  # of its attention on what followed the same token before
    chance: float  # the share of such places among all that it may look at


def maps(model: GPT, tokens: Tensor) -> list[Tensor]:
    """Each layer's attention weights (batch, heads, length, length), recorded while the model runs."""
    with torch.no_grad(), torch_attn.record_attention(model) as record:
        model(tokens)
    return record.last_maps()


def find_copying_head(model: GPT, plays: Plays) -> CopyingHead:
    """The head that puts most of its weight there, over the tokens of held-out text that have such a place."""
    tokens = windows(plays)[::8, :-1]
    again = follows_again(tokens)
    asked = again.any(-1)
    shares = torch.stack([(layer * again[:, None]).sum(-1).mT[asked].mean(0) for layer in maps(model, tokens)])
    layer, head = divmod(int(shares.argmax()), shares.size(1))
    seen = torch.arange(1, tokens.size(1) + 1)
    return CopyingHead(layer, head, shares[layer, head].item(), (again.sum(-1) / seen)[asked].mean().item())


def map_of_the_sentence(model: GPT, plays: Plays, chosen: CopyingHead) -> tuple[list[str], Tensor]:
    """The tokens of SENTENCE, and the head's weights (tokens, tokens) of it."""
    tokens = plays.encode(SENTENCE)
    return plays.pieces(tokens[0]), maps(model, tokens)[chosen.layer][0, chosen.head]


def draw(tokens: list[str], weights: Tensor, chosen: CopyingHead, file: Path, style: str = "light") -> None:
    figure = torch_attn.plot.heatmap(
        weights,
        tokens,
        title="What came after this, the last time?",
        query_label=f"each token attends (layer {chosen.layer + 1}, head {chosen.head + 1})",
        key_label="to these tokens",
        style=style,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
