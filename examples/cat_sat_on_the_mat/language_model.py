"""A small language model (a decoder-only transformer, Radford et al. 2018) of PyTorch's own layers, and its training.
torch_attn comes in by replace_mha.
"""

import random

import torch
from torch import Tensor, nn
from tqdm import trange

from grammar import LONGEST, PADDING, VERBS, WORDS, encode, find, sentence
from torch_attn import replace_mha

BATCH_SIZE = 64
STEPS = 300
LEARNING_RATE = 3e-3


class LanguageModel(nn.Module):
    """Words (batch, length) to logits of the next word (batch, length, words).

    ``looks_back=False`` is the model without attention: each word sees itself only.
    """

    def __init__(self, dim: int = 48, heads: int = 4, layers: int = 2, looks_back: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), dim)
        self.positions = nn.Parameter(torch.randn(LONGEST, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.next_word = nn.Linear(dim, len(WORDS))
        ones = torch.ones(LONGEST, LONGEST, dtype=torch.bool)
        self.register_buffer("hidden", ones.triu(1) if looks_back else ~torch.eye(LONGEST, dtype=torch.bool))
        replace_mha(self)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.size(1)
        x = self.words(tokens) + self.positions[:length]
        return self.next_word(self.layers(x, mask=self.hidden[:length, :length]))


def train(model: LanguageModel, seed: int, steps: int = STEPS, label: str = "training") -> None:
    """AdamW on fresh sentences in every step, with a one-cycle learning rate."""
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    with trange(steps, desc=label, unit="step") as bar:
        for _ in bar:
            tokens = encode([sentence(draw) for _ in range(BATCH_SIZE)])
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], ignore_index=WORDS.index(PADDING))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def accuracy_at_the_verb(model: LanguageModel, tokens: Tensor) -> float:
    """How often the word after the verb is predicted."""
    rows, verbs = torch.arange(len(tokens)), find(tokens, VERBS)
    return (model(tokens)[rows, verbs].argmax(1) == tokens[rows, verbs + 1]).float().mean().item()


def held_out(count: int = 500, seed: int = 10**6) -> Tensor:
    """Sentences of seeds that training does not use."""
    draw = random.Random(seed)
    return encode([sentence(draw) for _ in range(count)])
