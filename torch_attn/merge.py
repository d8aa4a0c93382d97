"""merge_attention: attention over parts of the keys becomes attention over all of them. Ring attention is built on it.

:func:`torch_attn.attention` with ``return_logsumexp=True`` gives what is merged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention of the same queries to disjoint sets of keys, merged into attention to all of these keys.

    With weights w_i = exp(logsumexp_i − logsumexp), where logsumexp = log Σ_i exp(logsumexp_i), the output is
    Σ_i w_i · output_i. The order of the parts does not matter, and merging may go on: the results are a part, too.
    Differentiable to any order, through both results. A sink is a part with output 0 and its logit as logsumexp.

    Args:
        outputs: the parts' outputs, at least one, each (..., L, Dv) and of one shape; float64, float32, bfloat16 or
            float16.
        logsumexps: the parts' logsumexps, natural logarithms, each (..., L); −inf where a row had no key in that part,
            and then that row of its output is not read.

    Returns:
        The merged output (..., L, Dv), of the dtype that the outputs' dtypes promote to; and logsumexp (..., L), of the
        dtype that the logsumexps' promote to. A row that no part had a key for has output 0, logsumexp −inf and zero
        gradients. Sums are taken in the wider of float32 and the inputs' dtypes.

    Raises:
        ValueError: for no parts, numbers of outputs and logsumexps that differ, or shapes that do not fit.

    Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", eq. 4 (of sums alone); Dao et al.
    2022, "FlashAttention", section 3.1 (with outputs); Liu et al. 2023, "Ring Attention with Blockwise Transformers for
    Near-Infinite Context" (across devices).
    """
    _check(outputs, logsumexps)
    dtype = outputs[0].dtype
    for output in outputs[1:]:
        dtype = torch.promote_types(dtype, output.dtype)
    stacked = torch.stack(tuple(logsumexps))
    accumulator = torch.promote_types(torch.promote_types(dtype, stacked.dtype), torch.float32)

    parts = stacked.to(accumulator)
    # A softmax of −inf alone is NaN, in its gradients too.
    empty = (parts == -math.inf).all(0)
    finite = parts.masked_fill(empty, 0.0)
    weights = torch.softmax(finite, 0)
    logsumexp = torch.logsumexp(finite, 0).masked_fill(empty, -math.inf)

    merged: Tensor | None = None
    for output, weight, part in zip(outputs, weights.unbind(0), parts.unbind(0), strict=True):
        rows = output.to(accumulator).masked_fill((part == -math.inf).unsqueeze(-1), 0.0)
        share = weight.unsqueeze(-1) * rows
        merged = share if merged is None else merged + share
    assert merged is not None
    return merged.to(dtype), logsumexp.to(stacked.dtype)


def _check(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> None:
    if not outputs:
        raise ValueError("merge_attention: outputs is empty, but there must be one part at least.")
    if len(outputs) != len(logsumexps):
        raise ValueError(
            "merge_attention: there must be as many logsumexps as outputs, but there are "
            f"{len(logsumexps)} and {len(outputs)}."
        )
    shape = outputs[0].shape
    for output, logsumexp in zip(outputs, logsumexps, strict=True):
        if output.shape != shape:
            raise ValueError(
                "merge_attention: all outputs must have the same shape, but there are "
                f"{tuple(shape)} and {tuple(output.shape)}."
            )
        if logsumexp.shape != shape[:-1]:
            raise ValueError(
                "merge_attention: each of logsumexps must have the shape of the outputs without their last dimension, "
                f"{tuple(shape[:-1])}, but one is {tuple(logsumexp.shape)}."
            )
        if not output.is_floating_point() or not logsumexp.is_floating_point():
            raise ValueError(
                f"merge_attention: outputs and logsumexps must be floating, but there are {output.dtype} and "
                f"{logsumexp.dtype}."
            )
