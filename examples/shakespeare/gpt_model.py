"""A small GPT (a decoder-only transformer, Radford et al. 2018) on torch_attn.attention, with a key-value cache.

Positions come from ALiBi's biases alone, so nothing has to be told where in the text a cached call stands.
"""

# No "from __future__ import annotations": TorchScript reads the annotations as types, not as strings.
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_attn

# How fast each head's attention falls off with the distance, from "here" to "anywhere".
SLOPES = (2.0, 0.5, 0.05, 0.0)
# The last two heads know a token by the one before it: the query "to" finds what followed the earlier "to"s. A simple
# form of the smeared keys of Olsson et al. 2022, "In-context Learning and Induction Heads", with which one layer can
# copy; else it takes two layers and a longer training to.
PLAIN_HEADS = 2


class CausalAttention(nn.Module):
    """``looks_at_content=False`` is the baseline: its queries are 0, so a token takes a mean of those before it whose
    weights depend on the distance alone.
    """

    def __init__(self, dim: int, looks_at_content: bool) -> None:
        super().__init__()
        self.heads = len(SLOPES)
        self.plain = PLAIN_HEADS
        self.looks_at_content = looks_at_content
        self.into = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.register_buffer("slopes", torch.tensor(SLOPES))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """(batch, length, dim), past (2, batch, heads, length before, dim / heads) -> the same, grown."""
        batch, length, dim = x.shape
        query, key, value = self.into(x).view(batch, length, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        kept = torch.stack([key, value])
        if past is not None:
            kept = torch.cat([past, kept], dim=3)
        before = functional.pad(kept[0, :, self.plain :, :-1], (0, 0, 1, 0))
        keys = torch.cat([kept[0, :, : self.plain], before], dim=1)
        if not self.looks_at_content:
            query = torch.zeros_like(query)
        # Bottom-right: the last query stands at the last key, however many keys are there from earlier calls.
        seen = torch_attn.attention(
            query, keys, kept[1], is_causal=True, causal_alignment="bottom_right", alibi_slopes=self.slopes
        )
        return self.out(seen.transpose(1, 2).reshape(batch, length, dim)), kept


class Block(nn.Module):
    def __init__(self, dim: int, looks_at_content: bool) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, looks_at_content)
        self.feedforward = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        seen, kept = self.attention(self.before_attention(x), past)
        x = x + seen
        return x + self.feedforward(x), kept


class GPT(nn.Module):
    def __init__(self, vocabulary: int, dim: int = 96, layers: int = 2, looks_at_content: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.tokens.weight, std=0.03)  # also the output's weights: logits begin near 0
        self.blocks = nn.ModuleList(Block(dim, looks_at_content) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, length) -> logits of the next token (batch, length, vocabulary), and what the next call takes as
        ``past``: keys and values (layers, 2, batch, heads, length so far, dim / heads).
        """
        x = self.tokens(tokens) * math.sqrt(self.tokens.embedding_dim)
        kept: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            x, grown = block(x, past[layer] if past is not None else None)
            kept.append(grown)
        return functional.linear(self.norm(x), self.tokens.weight), torch.stack(kept)


@torch.no_grad()
def write(model: nn.Module, start: Tensor, count: int, seed: int, cached: bool = True, warmth: float = 0.8) -> Tensor:
    """Draw ``count`` tokens after ``start`` (1, length) from the model; ``warmth`` divides the logits.

    With the cache each token is read once. Without, the whole text is read again for every token that is drawn.
    """
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens, past = start, None
    for draw in draws:
        logits, past = model(tokens[:, -1:] if past is not None else tokens, past)
        if not cached:
            past = None
        reached = (logits[0, -1].double() / warmth).softmax(0).cumsum(0)
        drawn = torch.searchsorted(reached, draw.clamp(max=reached[-1])).view(1, 1)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens
