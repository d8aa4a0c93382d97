"""A character-level encoder-decoder (Vaswani et al. 2017, "Attention Is All You Need") of PyTorch's own layers, and its
training. torch_attn comes in by replace_mha.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from dates import CHARACTERS, LONGEST_SOURCE, LONGEST_TARGET, NUMBER, PADDING, START, Calendar, Sentence
from dates import sources as sources_of
from dates import targets as targets_of
from gallery import fit
from torch_attn import replace_mha

BATCH_SIZE = 64
STEPS = 600
LEARNING_RATE = 4e-3


class Translator(nn.Module):
    """Characters of a date to the characters of its English.

    ``one_vector=True`` is the model without attention to the source: the decoder gets the mean of what the encoder
    made, one vector for the whole sentence. All else, and the number of parameters, stays the same.
    """

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 2, one_vector: bool = False) -> None:
        super().__init__()
        self.one_vector = one_vector
        self.padding = NUMBER[PADDING]
        self.start = NUMBER[START]
        self.characters = nn.Embedding(len(CHARACTERS), dim)
        self.source_places = nn.Parameter(torch.randn(LONGEST_SOURCE, dim) * 0.3)
        self.target_places = nn.Parameter(torch.randn(LONGEST_TARGET, dim) * 0.3)
        shape = {"dim_feedforward": 2 * dim, "dropout": 0.0, "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoderLayer(dim, heads, **shape)
        decoder = nn.TransformerDecoderLayer(dim, heads, **shape)
        self.encoder = nn.TransformerEncoder(encoder, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, layers, norm=nn.LayerNorm(dim))
        self.next_character = nn.Linear(dim, len(CHARACTERS))
        ahead = torch.ones(LONGEST_TARGET, LONGEST_TARGET, dtype=torch.bool).triu(1)
        self.register_buffer("ahead", ahead)
        replace_mha(self)

    def read(self, sources: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, LONGEST_SOURCE) -> what the decoder may look at (batch, length, dim), and where that is padding."""
        padding = sources == self.padding
        memory = self.encoder(self.characters(sources) + self.source_places, src_key_padding_mask=padding)
        if self.one_vector:
            text = (~padding).unsqueeze(2)
            memory = (memory * text).sum(1, keepdim=True) / text.sum(1, keepdim=True)
            padding = padding[:, :1]  # a text's first character is none
        return memory, padding

    def speak(self, memory: Tensor, padding: Tensor, begun: Tensor) -> Tensor:
        """Logits (batch, length, characters) of the character after each of ``begun`` (batch, length)."""
        length = begun.size(1)
        x = self.decoder(
            self.characters(begun) + self.target_places[:length],
            memory,
            tgt_mask=self.ahead[:length, :length],
            memory_key_padding_mask=padding,
        )
        return self.next_character(x)

    def forward(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Logits (batch, LONGEST_TARGET, characters) of each character of ``targets``, from those before it."""
        memory, padding = self.read(sources)
        begun = torch.cat([torch.full_like(targets[:, :1], self.start), targets[:, :-1]], dim=1)
        return self.speak(memory, padding, begun)

    @torch.jit.export
    def translate(self, sources: Tensor) -> Tensor:
        """(batch, LONGEST_TARGET): the likeliest character, one after another."""
        memory, padding = self.read(sources)
        said = torch.full_like(sources[:, :1], self.start)
        for _ in range(self.target_places.size(0)):
            following = self.speak(memory, padding, said)[:, -1].argmax(1, keepdim=True)
            said = torch.cat([said, following], dim=1)
        return said[:, 1:]


def train(model: Translator, calendar: Calendar, seed: int, steps: int = STEPS, label: str = "training") -> float:
    """On fresh dates of the training calendar in every step; returns the seconds."""
    draw = random.Random(seed)

    def loss() -> Tensor:
        batch = calendar.training_batch(BATCH_SIZE, draw)
        target = targets_of(batch)
        return nn.functional.cross_entropy(model(sources_of(batch), target).flatten(0, 1), target.flatten())

    return fit(model, loss, steps, LEARNING_RATE, label)


@torch.no_grad()
def exact(model: Translator, sentences: list[Sentence]) -> Tensor:
    """(sentences,) bool: every character right."""
    return (model.translate(sources_of(sentences)) == targets_of(sentences)).all(1)
