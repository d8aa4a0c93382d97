"""A small masked language model (Devlin et al. 2019, "BERT") of PyTorch's own layers; torch_attn comes in by
replace_mha. Used by bert_demo.py and the tests.
"""

# No "from __future__ import annotations": TorchScript reads the annotations as types, not as strings.
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_attn import replace_mha

PADDING, MASK = 0, 1  # the tokens' numbers
LONGEST = 48  # tokens of a passage

# How fast each head's attention falls off with the distance, to the left and to the right: ALiBi's biases, with heads
# that look to one side only. Learned positions alone find out what a neighbour is late in such a short training.
SLOPES = ((1.0, math.inf), (math.inf, 1.0), (0.3, 0.3), (0.0, 0.0))


def head_biases() -> Tensor:
    """(heads, LONGEST, LONGEST), to be added to the scores; a token may always look at itself."""
    to_the_right = torch.arange(LONGEST) - torch.arange(LONGEST)[:, None]
    left, right = (torch.tensor(slopes)[:, None, None] for slopes in zip(*SLOPES, strict=True))
    bias = torch.where(to_the_right < 0, left * to_the_right, -right * to_the_right)
    return bias.masked_fill(to_the_right == 0, 0.0)


class MaskedModel(nn.Module):
    def __init__(self, vocabulary: int, dim: int = 96, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.tokens.weight, std=0.03)  # also the output's weights: logits begin near 0
        self.positions = nn.Parameter(torch.randn(LONGEST, dim) * 0.03)
        self.start = nn.LayerNorm(dim)
        self.padding = PADDING
        self.register_buffer("head_biases", head_biases(), persistent=False)
        layer = nn.TransformerEncoderLayer(
            dim, len(SLOPES), 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        replace_mha(self)

    def read(self, tokens: Tensor) -> Tensor:
        """(batch, length), 0 where it is padded -> what the encoder makes of it (batch, length, dim)."""
        x = self.start(self.tokens(tokens) + self.positions[: tokens.size(1)])
        biases = self.head_biases[:, : x.size(1), : x.size(1)].repeat(x.size(0), 1, 1)
        padding = x.new_zeros(tokens.shape).masked_fill(tokens == self.padding, -math.inf)
        return self.encoder(x, mask=biases, src_key_padding_mask=padding)

    def answer(self, x: Tensor) -> Tensor:
        """(..., dim) -> logits of the token that stands there (..., vocabulary)."""
        return functional.linear(x, self.tokens.weight, self.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, vocabulary)."""
        return self.answer(self.read(tokens))
