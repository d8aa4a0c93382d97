"""attention_rollout: how much of each input token arrives in each token of the last layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_rollout(maps: Sequence[Tensor], *, heads: str = "mean", residual: float = 0.5) -> Tensor:
    """Multiply the layers' maps, each mixed with the identity for the residual connection around it.

    With A_l = (1 − residual) · W_l + residual · I, rows normalised to 1, the rollout is A_n ··· A_2 A_1: row i says
    from which input tokens token i of the last layer is made. Maps are taken to float32 or wider.

    Args:
        maps: the layers' attention maps in the order of the layers, each (..., H, L, L), or (..., L, L) for
            ``heads="none"``; at least one, of one shape but for H. What ``record_attention`` collects fits:
            ``record.last_maps()``.
        heads: how a layer's heads become one map: "mean" as in the paper, "max" or "min"; "none": the maps have no
            heads.
        residual: share of the residual connection, in [0, 1); 0.5 in the paper.

    Raises:
        ValueError: for no maps, maps that are not square or do not fit together, or another ``heads`` or ``residual``.

    Returns:
        (..., L, L); rows sum to 1.

    Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3.
    """
    if heads not in ("mean", "max", "min", "none"):
        raise ValueError(f'heads is {heads!r}, but must be "mean", "max", "min" or "none".')
    if not 0 <= residual < 1:
        raise ValueError(f"residual is {residual}, but must lie in [0, 1).")
    if not maps:
        raise ValueError("maps is empty, but rollout needs the map of one layer at least.")
    rollout: Tensor | None = None
    for layer, weights in enumerate(maps):
        least = 2 if heads == "none" else 3
        if weights.dim() < least or weights.size(-1) != weights.size(-2):
            raise ValueError(
                f"maps[{layer}] is {tuple(weights.shape)}, but must be "
                f"{'(..., L, L)' if heads == 'none' else '(..., H, L, L)'}: rollout is for self-attention."
            )
        one = weights.to(torch.promote_types(weights.dtype, torch.float32))
        if heads == "mean":
            one = one.mean(-3)
        elif heads != "none":
            one = one.amax(-3) if heads == "max" else one.amin(-3)
        if rollout is not None and one.shape != rollout.shape:
            raise ValueError(
                f"maps[{layer}] is {tuple(weights.shape)}, which does not fit {tuple(maps[0].shape)} of maps[0]."
            )
        mixed = (1 - residual) * one + residual * torch.eye(one.size(-1), dtype=one.dtype, device=one.device)
        total = mixed.sum(-1, keepdim=True)  # 0 only for a row without keys where residual is 0
        mixed = mixed / total.masked_fill(total == 0, 1.0)
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    return rollout
