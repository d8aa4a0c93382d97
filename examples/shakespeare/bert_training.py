"""Passages of the plays with tokens masked, padded into batches; training on them, and what is measured."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from bert_model import LONGEST, MASK, PADDING, MaskedModel
from plays import VOCABULARY, Plays

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from fixed_mixing import fix_mixing  # noqa: E402
from gallery import fit  # noqa: E402

SHORTEST = 8  # tokens of a passage
MASKED = 0.15  # share of the tokens where answers are counted
MASKED_IN_TRAINING = 0.3  # more to learn from a batch (Wettig et al. 2023, "Should You Mask 15%?")
BATCH_SIZE = 40
STEPS = 600
LEARNING_RATE = 8e-3


def passages(speeches: list[list[int]], plays: Plays) -> list[Tensor]:
    """What is said, without the speakers' names; long speeches in pieces."""
    line_end = plays.tokenizer.token_to_id("\n")
    said = [torch.tensor(speech[speech.index(line_end) + 1 : -2]) for speech in speeches]
    return [piece for speech in said for piece in speech.split(LONGEST) if len(piece) >= SHORTEST]


def batch(chosen: list[Tensor], draw: torch.Generator, masked: float = MASKED) -> tuple[Tensor, Tensor]:
    """The tokens with some masked, and the tokens as they are, both (batch, longest of them), padded with 0."""
    tokens = pad_sequence(chosen, batch_first=True, padding_value=PADDING)
    hidden = (torch.rand(tokens.shape, generator=draw) < masked) & (tokens != PADDING)
    return tokens.masked_fill(hidden, MASK), tokens


def trained(plays: Plays, looks_at_content: bool, seed: int, steps: int, label: str) -> MaskedModel:
    """One seed makes the same batches for both models."""
    torch.manual_seed(seed)
    model = MaskedModel(VOCABULARY)
    if not looks_at_content:
        fix_mixing(model.encoder, LONGEST)
    texts, pick, draw = passages(plays.train, plays), random.Random(seed), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        seen, tokens = batch(pick.sample(texts, BATCH_SIZE), draw, MASKED_IN_TRAINING)
        hidden = seen == MASK
        return functional.cross_entropy(model.answer(model.read(seen)[hidden]), tokens[hidden])

    fit(model, loss, steps, LEARNING_RATE, label)
    return model


class Guesses(NamedTuple):
    """Shares of the masked tokens of the held-out plays that are guessed, at once or among the first five."""

    first: float
    first_five: float


def batches(plays: Plays) -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out passages, masked alike for whoever asks."""
    texts, draw = passages(plays.held_out, plays), torch.Generator().manual_seed(0)
    for place in range(0, len(texts), 128):
        yield batch(texts[place : place + 128], draw)


@torch.no_grad()
def guesses(model: MaskedModel, plays: Plays) -> Guesses:
    right = []
    for seen, tokens in batches(plays):
        hidden = seen == MASK
        right.append(model.answer(model.read(seen)[hidden]).topk(5).indices == tokens[hidden][:, None])
    five = torch.cat(right).float()
    return Guesses(five[:, 0].mean().item(), five.sum(1).mean().item())


def most_frequent(plays: Plays) -> Guesses:
    """Guessing the most frequent tokens of the training plays everywhere."""
    counts = torch.cat(passages(plays.train, plays)).bincount(minlength=VOCABULARY)
    asked = torch.cat([tokens[seen == MASK] for seen, tokens in batches(plays)])
    five = (asked[:, None] == counts.topk(5).indices).float()
    return Guesses(five[:, 0].mean().item(), five.sum(1).mean().item())
