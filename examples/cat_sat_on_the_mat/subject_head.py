"""Finds the head that looks from the verb to the subject, and draws its map of the example's sentence."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor

import torch_attn
from grammar import PLACES, SENTENCE, VERBS, encode, find
from language_model import LanguageModel

matplotlib.use("Agg")  # draws into a file, so no screen is needed


class SubjectHead(NamedTuple):
    layer: int
    head: int
    share: float  # of the verb's attention that is on the subject, the mean over sentences


def maps(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """Each layer's attention weights (batch, heads, length, length), recorded while the model runs."""
    with torch.no_grad(), torch_attn.record_attention(model) as record:
        model(tokens)
    return record.last_maps()


def find_subject_head(model: LanguageModel, tokens: Tensor) -> SubjectHead:
    """The head with the largest weight from verb to subject, over sentences in which optional words move the two."""
    rows = torch.arange(len(tokens))
    verbs, subjects = find(tokens, VERBS), find(tokens, tuple(PLACES))
    shares = torch.stack([layer[rows, :, verbs, subjects].mean(0) for layer in maps(model, tokens)])
    layer, head = divmod(int(shares.argmax()), shares.size(1))
    return SubjectHead(layer, head, shares[layer, head].item())


def map_of_the_sentence(model: LanguageModel, chosen: SubjectHead) -> tuple[list[str], Tensor]:
    """The words of SENTENCE, and the head's weights (words, words) of it."""
    words = SENTENCE.split()
    tokens = encode([words])[:, : len(words)]
    return words, maps(model, tokens)[chosen.layer][0, chosen.head]


def draw(words: list[str], weights: Tensor, chosen: SubjectHead, file: Path, style: str = "light") -> None:
    share = weights[words.index("sat"), words.index("cat")]
    figure = torch_attn.plot.heatmap(
        weights,
        [words[0].capitalize(), *words[1:]],
        title=f"“sat” attends “cat” with {share:.0%}",
        query_label=f"each word attends (layer {chosen.layer + 1}, head {chosen.head + 1})",
        key_label="to these words",
        style=style,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
