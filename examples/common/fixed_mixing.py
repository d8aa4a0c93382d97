"""The baseline without attention of examples/shakespeare and examples/digits_vit: a layer that mixes tokens by weights
that depend on their places alone, never on what the tokens are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torch_attn


class FixedMixing(torch_attn.MultiheadAttention):
    """Queries and keys are made of learned vectors of the places, values of the tokens; otherwise its parent.

    Once trained, the weights are one table a head, the same for every input: the "random synthesizer" of Tay et al.
    2021, factorised. It can learn that the left neighbour matters, but not which word does.
    """

    def __init__(self, embed_dim: int, num_heads: int, length: int) -> None:
        super().__init__(embed_dim, num_heads, batch_first=True)
        self.places = nn.Parameter(torch.randn(length, embed_dim) * 0.5)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention's call, of which only ``value`` (batch, length, dim) and the masks are used."""
        places = self.places[: value.size(1)].expand_as(value)
        return super().forward(
            places, places, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


def fix_mixing(encoder: nn.TransformerEncoder, length: int) -> None:
    """Put FixedMixing in place of every layer's attention, before training; ``length``: of the longest input."""
    for layer in encoder.layers:
        layer.self_attn = FixedMixing(layer.self_attn.embed_dim, layer.self_attn.num_heads, length)
    torch_attn.replace_mha(encoder)  # so that the layers call it in evaluation too, see there
