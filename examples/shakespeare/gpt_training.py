"""Training of the GPT on windows of the plays, and what is measured on the plays that were held out."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gpt_model import GPT
from plays import VOCABULARY, Plays, joined

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from gallery import fit  # noqa: E402

WINDOW = 256  # tokens, some 600 characters
BATCH_SIZE = 8
STEPS = 700
LEARNING_RATE = 0.01


def trained(plays: Plays, looks_at_content: bool, seed: int, steps: int, label: str) -> GPT:
    """One seed makes the same windows for both models."""
    torch.manual_seed(seed)
    model = GPT(VOCABULARY, looks_at_content=looks_at_content)
    text = joined(plays.train)
    draw = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        starts = torch.randint(len(text) - WINDOW, (BATCH_SIZE, 1), generator=draw)
        tokens = text[starts + torch.arange(WINDOW + 1)]
        return functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())

    fit(model, loss, steps, LEARNING_RATE, label)
    return model


def windows(plays: Plays) -> Tensor:
    """(windows, WINDOW + 1): the held-out plays cut up; each window begins with the last token of the one before."""
    text = joined(plays.held_out)
    return text[: (len(text) - 1) // WINDOW * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)


def follows_again(tokens: Tensor) -> Tensor:
    """(batch, length) -> (batch, length, length), bool: key j holds what followed an earlier token equal to query i.

    These are the places that a copying head ("induction head") looks at.
    """
    same = tokens[:, :, None] == tokens[:, None, :]
    return functional.pad(same[:, :, :-1], (1, 0)).tril()


class Bits(NamedTuple):
    """Per character of the held-out plays."""

    everywhere: float
    repeated: float  # at tokens that the window has seen follow the same token before
    new: float  # at all others


@torch.no_grad()
def bits_per_character(model: GPT, plays: Plays) -> Bits:
    characters = torch.tensor([len(plays.tokenizer.id_to_token(number)) for number in range(VOCABULARY)])
    tokens = windows(plays)
    losses, repeated = [], []
    for batch in tokens.split(32):
        losses.append(functional.cross_entropy(model(batch[:, :-1])[0].mT, batch[:, 1:], reduction="none"))
        again = follows_again(batch[:, :-1])
        repeated.append((again & (batch[:, None, :-1] == batch[:, 1:, None])).any(-1))
    loss, seen, lengths = torch.cat(losses), torch.cat(repeated), characters[tokens[:, 1:]]
    chosen = [torch.ones_like(seen), seen, ~seen]
    return Bits(*(loss[part].sum().item() / lengths[part].sum().item() / math.log(2) for part in chosen))
