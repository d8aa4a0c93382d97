"""A transformer whose tokens are the columns of a table: FT-Transformer (Gorishniy et al. 2021, "Revisiting Deep
Learning Models for Tabular Data"), of PyTorch's own layers. torch_attn comes in by replace_mha.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gallery import fit
from torch_attn import replace_mha
from tumours import Fold

BATCH_SIZE = 64
STEPS = 150
LEARNING_RATE = 3e-3


class FeatureModel(nn.Module):
    """Measurements (batch, features) to the logit (batch,) of malignant.

    Each measurement becomes a token, x · slope + offset; a class token reads them. ``attends=False`` is the model
    without attention: each token sees itself alone, and the answer is read from the mean of all.
    """

    def __init__(self, features: int, dim: int = 32, heads: int = 4, layers: int = 2, attends: bool = True) -> None:
        super().__init__()
        self.attends = attends
        self.slope = nn.Parameter(torch.randn(features, dim) * 0.3)
        self.offset = nn.Parameter(torch.randn(features, dim) * 0.3)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.3)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.malignant = nn.Linear(dim, 1)
        self.register_buffer("hidden", ~torch.eye(1 + features, dtype=torch.bool))
        replace_mha(self)

    def forward(self, values: Tensor) -> Tensor:
        tokens = values.unsqueeze(2) * self.slope + self.offset
        tokens = torch.cat([self.class_token.expand(values.size(0), -1, -1), tokens], dim=1)
        if self.attends:
            read = self.layers(tokens)[:, 0]
        else:
            read = self.layers(tokens, mask=self.hidden).mean(1)
        return self.malignant(read).squeeze(1)


def train(model: FeatureModel, fold: Fold, seed: int, steps: int = STEPS, label: str = "training") -> float:
    """On random rows of the fold's training part; returns the seconds."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        rows = torch.randint(len(fold.train_values), (BATCH_SIZE,), generator=generator)
        return nn.functional.binary_cross_entropy_with_logits(
            model(fold.train_values[rows]), fold.train_malignant[rows]
        )

    return fit(model, loss, steps, LEARNING_RATE, label, weight_decay=0.1)


@torch.no_grad()
def right(model: nn.Module, values: Tensor, malignant: Tensor) -> Tensor:
    """(batch,) bool."""
    return (model(values) > 0) == (malignant > 0.5)
