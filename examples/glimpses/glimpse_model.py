"""A model that reads a few patches of a canvas: a blurred view says where to look, and only there it sees the pixels.

In the words of attention, the values are the pixels of all patches, the keys come from the blurred view, and each of a
few learned queries reads one patch. The classifier gets these patches and nothing else.
"""

import torch
from torch import Tensor, nn

from canvas import CANVAS
from torch_attn import HardAttention, hard_attention

PATCH = 8  # pixels a side, as many as a digit has
STRIDE = 2
PLACES = (CANVAS - PATCH) // STRIDE + 1  # a side
RANDOM = "random"  # instead of an estimator: looks anywhere, with equal probability, in training and evaluation


class GlimpseModel(nn.Module):
    def __init__(self, estimator: str, glimpses: int = 3, num_samples: int = 4, dim: int = 32) -> None:
        super().__init__()
        self.estimator = estimator
        self.num_samples = num_samples
        self.queries = nn.Parameter(torch.randn(1, 1, glimpses, dim))
        # A cell of the blurred view is the mean of 4x4 pixels; 3x3 cells, two pixels apart, cover one patch.
        self.blur = nn.AvgPool2d(4, stride=STRIDE)
        self.look = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, dim, 1)
        )
        self.read = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (PATCH // 2) ** 2, 128),
            nn.ReLU(),
        )
        self.answer = nn.Linear(128, 10)
        for layer in self.read:  # strong signals from the start, as most early glimpses show nothing
            if hasattr(layer, "weight"):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def choose(self, images: Tensor) -> HardAttention:
        """Glimpses as attention: ``output`` (..., N, 1, glimpses, pixels), ``indices`` (..., N, 1, glimpses)."""
        keys = self.look(4 * self.blur(images)).flatten(2).mT.unsqueeze(1)
        patches = nn.functional.unfold(images, PATCH, stride=STRIDE).mT.unsqueeze(1)
        queries = self.queries.expand(len(images), -1, -1, -1)
        if self.estimator == RANDOM:
            keys = torch.zeros_like(keys)  # equal scores
        estimator = "reinforce" if self.estimator == RANDOM else self.estimator if self.training else "argmax"
        samples = self.num_samples if self.training else 1
        return hard_attention(queries, keys, patches, estimator=estimator, num_samples=samples)

    def forward(self, images: Tensor) -> tuple[Tensor, HardAttention]:
        """(N, 1, CANVAS, CANVAS) to logits (..., N, 10) and the choice, with samples first in training."""
        choice = self.choose(images)
        seen = choice.output.squeeze(-3)
        features = self.read(2 * seen.reshape(-1, 1, PATCH, PATCH)).view(*seen.shape[:-1], -1)
        return self.answer(features.sum(-2)), choice


def corners(indices: Tensor) -> Tensor:
    """Row and column, in pixels, where the patches with these indices begin: (..., 2)."""
    return STRIDE * torch.stack([indices // PLACES, indices % PLACES], -1)
