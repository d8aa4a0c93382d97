"""The model: convolutions over the frames of a spectrogram, and one learned query that attends to some of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clips import BANDS, STRETCH, Clips, make_clips
from gallery import fit
from torch_attn import MultiheadAttention
from words import WORDS, Spoken

BATCH_SIZE = 32
STEPS = 500
LEARNING_RATE = 3e-3


class Listener(nn.Module):
    """Spectrograms (batch, BANDS, columns) to logits (batch, words).

    ``attends=False`` is the model without attention: it takes the mean of all frames.
    """

    def __init__(self, dim: int = 64, heads: int = 4, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends
        self.frames = nn.Sequential(
            nn.Conv1d(BANDS, dim, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv1d(dim, dim, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(dim, dim, 5, padding=2),
        )
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = MultiheadAttention(dim, heads, batch_first=True)
        self.word = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, len(WORDS)))

    def forward(self, spectrograms: Tensor) -> Tensor:
        frames = self.norm(self.frames(spectrograms).transpose(1, 2))
        if self.attends:
            query = self.query.expand(frames.size(0), -1, -1)
            heard = self.attention(query, frames, frames, need_weights=False)[0].squeeze(1)
        else:
            heard = frames.mean(1)
        return self.word(heard)


def train(model: Listener, spoken: Spoken, seed: int, steps: int = STEPS, label: str = "training") -> float:
    """On the spoken words, each time at another place, in other noise and of another length; returns the seconds."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(spoken.waves), (BATCH_SIZE,), generator=generator)
        clips = make_clips(spoken, rows, generator, STRETCH)
        return nn.functional.cross_entropy(model(clips.spectrograms), clips.labels)

    return fit(model, loss, steps, LEARNING_RATE, label)


@torch.no_grad()
def right(model: Listener, clips: Clips) -> Tensor:
    """(N,) bool."""
    return model(clips.spectrograms).argmax(1) == clips.labels
