"""A small causal language model with rotary positions, trained alone or on sequences that processes share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torch_attn
from torch_attn.distributed import Layout, ring_attention, shard_positions

WIDTH, HEADS, TOKENS, LENGTH, BATCH, STEPS = 16, 2, 11, 40, 2, 4
MODEL_LAYOUT: Layout = "striped"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch_attn.attention(query, key, value, is_causal=True)


def attend_by_ring(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return ring_attention(query, key, value, is_causal=True, layout=MODEL_LAYOUT)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of (B, H, L, D)."""
    half = x.size(-1) // 2
    angles = positions[:, None] * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], -1)


class LanguageModel(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.embedding = nn.Embedding(TOKENS, WIDTH, dtype=torch.float64)
        self.projections = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64) for _ in range(2)])
        self.head = nn.Linear(WIDTH, TOKENS, dtype=torch.float64)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for projection in self.projections:
            query, key, value = projection(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            attended = self.attend(rotated(query, positions), rotated(key, positions), value)
            x = x + attended.transpose(1, 2).flatten(2)
        return self.head(x)


def train(attend: Attend, share: Callable[[Tensor], Tensor]) -> list[float]:
    """The losses of a few steps; ``share`` gives a process its part of a batch (B, L)."""
    torch.manual_seed(0)
    model = LanguageModel(attend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens = torch.randint(TOKENS, (BATCH, LENGTH + 1))
    inputs, targets = share(tokens[:, :-1]), share(tokens[:, 1:])
    alone = not dist.is_initialized()
    positions = torch.arange(LENGTH) if alone else shard_positions(inputs.size(1), layout=MODEL_LAYOUT)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs, positions).flatten(0, 1), targets.flatten(), reduction="sum")
        (loss / targets.numel()).backward()
        loss = loss.detach()
        if not alone:
            dist.all_reduce(loss)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        losses.append(loss.item() / (BATCH * LENGTH))
    return losses
