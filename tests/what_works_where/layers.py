"""Every option of attention as a layer, whose own tensors (a bias table, slopes, sinks) are parameters; and a model of
all of them side by side, which one compilation, one saved file or one distributed run tries at once.

Written so that TorchScript, too, can read it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import torch_attn
from torch_attn import reference

HEADS, HEAD_DIM, VALUE_DIM = 4, 4, 3
WIDTH = 2 * HEAD_DIM + VALUE_DIM
LONGEST = 64  # of the masks, which are cut to the length of the call, and the largest batch

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom-right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window_left": 2, "window_right": 1},
    "boolean mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float"},
    "key lengths": {"key_lengths": True},
    "grouped heads": {"kv_heads": 2},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "ALiBi": {"alibi_slopes": True},
    "sinks": {"sinks": True},
    "logsumexp": {"returns_logsumexp": True},
    "dropout": {"dropout_p": 0.4},
}


class Layer(nn.Module):
    """(B, HEADS, L, WIDTH), queries, keys and values side by side, to (B, HEADS, L − 1, VALUE_DIM): one query fewer.

    With the option "logsumexp" that is added to the output.
    """

    def __init__(self, option: str, dtype: torch.dtype) -> None:
        super().__init__()
        options = OPTIONS[option]
        self.sizes = [HEAD_DIM, HEAD_DIM, VALUE_DIM]
        self.is_causal: bool = options.get("is_causal", False)
        self.causal_alignment: str = options.get("causal_alignment", "top_left")
        self.window_left = options.get("window_left")
        self.window_right = options.get("window_right")
        self.scale = options.get("scale")
        self.softcap: float = options.get("softcap", 0.0)
        self.dropout_p: float = options.get("dropout_p", 0.0)
        self.kv_heads: int = options.get("kv_heads", HEADS)
        self.returns_logsumexp: bool = options.get("returns_logsumexp", False)
        mask = options.get("attn_mask")
        self.attn_mask = nn.Parameter(torch.randn(LONGEST, LONGEST, dtype=dtype)) if mask == "float" else None
        self.register_buffer("bool_mask", torch.rand(LONGEST, LONGEST) > 0.4 if mask == "bool" else None)
        self.register_buffer("key_lengths", torch.arange(LONGEST) % 2 * 3 if "key_lengths" in options else None)
        # Slopes and sinks have the accumulator's type.
        parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.alibi_slopes = (
            nn.Parameter(torch.rand(HEADS, dtype=parameter_dtype)) if "alibi_slopes" in options else None
        )
        self.sinks = nn.Parameter(torch.randn(HEADS, dtype=parameter_dtype)) if "sinks" in options else None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = x.split(self.sizes, dim=-1)
        return query[:, :, 1:], key[:, : self.kv_heads], value[:, : self.kv_heads]

    def masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        mask = self.attn_mask if self.attn_mask is not None else self.bool_mask
        if mask is not None:
            mask = mask[1 : x.size(2), : x.size(2)]
        key_lengths = self.key_lengths
        if key_lengths is not None:
            key_lengths = key_lengths[: x.size(0)].clamp(max=x.size(2))
        return mask, key_lengths

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        attn_mask, key_lengths = self.masks(x)
        if self.returns_logsumexp:
            out, logsumexp = torch.ops.torch_attn.attention_with_logsumexp(query, key, value)
            return out + logsumexp.unsqueeze(-1)
        return torch_attn.attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            window_left=self.window_left,
            window_right=self.window_right,
            causal_alignment=self.causal_alignment,
            alibi_slopes=self.alibi_slopes,
            softcap=self.softcap,
            sinks=self.sinks,
            key_lengths=key_lengths,
            enable_gqa=True,
        )

    @torch.jit.unused
    def keep_mask(self, x: Tensor) -> Tensor:
        """The weights that dropout keeps in a call which draws from the generator as it is now."""
        query, key, value = self.split(x)
        state = torch.ops.torch_attn.attention_forward(query, key, value, dropout_p=self.dropout_p)[2]
        sizes = (query.size(0), HEADS, query.size(2), key.size(2))
        return torch.ops.torch_attn.dropout_keep_mask(state, *sizes, self.dropout_p)

    @torch.jit.unused
    def reference(self, x: Tensor, keep_mask: Tensor | None) -> Tensor:
        """The same in ordinary torch operations."""
        attn_mask, key_lengths = self.masks(x)
        out, logsumexp, _ = reference.attention(
            *self.split(x),
            attn_mask=attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            window_left=self.window_left,
            window_right=self.window_right,
            causal_alignment=self.causal_alignment,
            alibi_slopes=self.alibi_slopes,
            softcap=self.softcap,
            sinks=self.sinks,
            key_lengths=key_lengths,
            keep_mask=keep_mask,
        )
        return out + logsumexp.unsqueeze(-1) if self.returns_logsumexp else out


class AllOptions(nn.Module):
    """Input i of (options, B, HEADS, L, WIDTH) goes through layer i; so the outputs' gradients, too, are apart."""

    def __init__(self, layers: Iterable[Layer] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(o, torch.float32) for o in OPTIONS] if layers is None else layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            outputs.append(layer(x[i]))
        return outputs
