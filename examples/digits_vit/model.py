"""A vision transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") for 8x8 images, made of PyTorch's own
layers. Nothing here knows of torch_attn: replace_mha does its work on the finished model.
"""

import torch
from torch import Tensor, nn


class VisionTransformer(nn.Module):
    def __init__(
        self,
        image_size: int = 8,
        patch_size: int = 2,
        dim: int = 64,
        heads: int = 4,
        layers: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim) * 0.5)
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, dim) * 0.5)
        layer = nn.TransformerEncoderLayer(
            dim, heads, dim_feedforward=4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def tokens(self, images: Tensor) -> Tensor:
        """(batch, 1, height, width) -> (batch, 1 + patches, dim), the class token first."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(patches.size(0), -1, -1), patches], dim=1) + self.positions

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(images))[:, 0])
