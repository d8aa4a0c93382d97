"""torch_attn as an attention implementation of Hugging Face transformers 5.

    import torch_attn.integrations.transformers
    torch_attn.integrations.transformers.register()
    model.set_attn_implementation("torch_attn")  # or from_pretrained(..., attn_implementation="torch_attn")

transformers looks attention functions up by name: its models call ``attention_forward`` with what they have projected,
and ``attention_mask`` when they make the mask for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import torch_attn

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    cause: BaseException = error
    while cause.__cause__ is not None:  # transformers says that it could not import, its causes say why
        cause = cause.__cause__
    raise ImportError(
        f"torch_attn.integrations.transformers needs transformers 5.23 or newer, and importing it failed: {cause}. "
        "Without it, pip install 'torch_attn[transformers]'."
    ) from error

NAME = "torch_attn"

# What a few models hand to attention functions and what changes the result, but is not done here: refused, not ignored.
_REFUSED = {
    "cache": "a paged cache (continuous batching)",
    "indices": "a sparse choice of keys",
    "block_indices": "a sparse choice of blocks of keys",
    "sinks": "sinks that depend on the token",
}


def register() -> None:
    """Make ``"torch_attn"`` known to transformers, for attention and for masks; doing it twice changes nothing.

    Served are causal, bidirectional, padding, sliding-window and chunked masks (as boolean masks, or as the kernel's
    own causal mask where there is no padding), a position bias (T5), softcap (Gemma 2), sinks (gpt-oss), grouped-query
    attention, static and dynamic caches, and ``output_attentions=True`` as an argument of the call: the maps then come
    from :func:`torch_attn.attention_weights`, without the weights' dropout. A row with nothing to attend, such as a
    padded query, gives 0, where "eager" gives some mean of the masked values.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# True where a key is attended, (batch, 1, L, S), or None where is_causal or nothing says the same: SDPA's own.
attention_mask = sdpa_mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' models call, with the arguments of its ``sdpa_attention_forward``.

    Args:
        module: the attention layer; its ``is_causal`` says what a missing mask means.
        query: (B, Hq, L, D).
        key: (B, Hkv, S, D), not repeated for grouped-query attention.
        value: (B, Hkv, S, Dv).
        attention_mask: broadcastable to (B, Hq, L, S), bool (True: attend) or floating (added).
        dropout: probability of dropping a weight.
        scaling: factor of query · key; ``1 / sqrt(D)`` when None.
        is_causal: overrules the module's.
        position_bias: added to the scores, broadcastable to (B, Hq, L, S); receives a gradient.
        softcap: scores become softcap · tanh(score / softcap).
        s_aux: (Hq), a logit per head that joins the softmax's sum.

    Returns:
        The output (B, L, Hq, Dv), and the weights (B, Hq, L, S) if the model was asked for them, else None.
    """
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes {name}: attn_implementation='{NAME}' does not serve {meaning}."
            )
    # As for SDPA: without a mask a layer is causal if it says so, and a single query sees the whole cache. The length
    # comes last, because under torch.export it is symbolic and asking would fix it.
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and bool(is_causal) and bool(query.shape[2] > 1)
    options = {
        "attn_mask": _merge(attention_mask, position_bias),
        "is_causal": causal,
        "scale": scaling,
        "softcap": softcap or 0.0,
        "sinks": s_aux,
        "enable_gqa": key.shape[1] != query.shape[1],
    }
    if not _wants_weights(kwargs):
        out = torch_attn.attention(query, key, value, dropout_p=dropout, **options)
        return out.transpose(1, 2), None
    out, logsumexp = torch_attn.attention(query, key, value, dropout_p=dropout, **options, return_logsumexp=True)
    return out.transpose(1, 2), torch_attn.attention_weights(query, key, **options, logsumexp=logsumexp)


def _merge(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Not every model hands ``output_attentions`` on to its layers; those that do not collect the weights by hooks."""
    if kwargs.get("output_attentions"):
        return True
    return any(name.endswith("attentions") for name in _active_collector.get() or ())
