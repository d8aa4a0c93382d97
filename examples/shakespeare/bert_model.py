"""A small masked language model (Devlin et al. 2019, "BERT") of PyTorch's own layers; torch_attn comes in by
replace_mha. Used by bert_demo.py and the tests.
"""

# No "from __future__ import annotations": TorchScript reads the annotations as types, not as strings.
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_attn import replace_mha

PADDING, MASK = 0, 1  # the tokens' numbers
LONGEST = 48  # tokens of a passage


class MaskedModel(nn.Module):
    def __init__(self, vocabulary: int, dim: int = 96, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.tokens.weight, std=0.03)  # also the output's weights: logits begin near 0
        self.positions = nn.Parameter(torch.randn(LONGEST, dim) * 0.03)
        self.start = nn.LayerNorm(dim)
        self.padding = PADDING
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        replace_mha(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length), 0 where it is padded -> logits of what stands there (batch, length, vocabulary)."""
        x = self.start(self.tokens(tokens) + self.positions[: tokens.size(1)])
        x = self.encoder(x, src_key_padding_mask=tokens == self.padding)
        return functional.linear(x, self.tokens.weight, self.bias)
