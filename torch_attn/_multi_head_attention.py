"""The forward pass of torch_attn.MultiheadAttention as free functions: checks, projections, masks, kernel, weights.
HardMultiheadAttention shares all of it but the kernel and the weights.

TorchScript compiles them as they stand, so that a scripted module holds the operator ``torch_attn::attention`` and runs
from C++ without Python. N is the batch, L and S are the lengths of query and key, H the heads, E = H · D the width.
"""

# No "from __future__ import annotations": TorchScript reads the annotations as types, not as strings.
import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import dropout_scale


class HeadsAndMask(NamedTuple):
    """What the kernel is called with: q (N, H, L, D), k and v (N, H, S, D) with the appended keys, and their mask."""

    heads: list[Tensor]  # [q, k, v]; or, where it was asked for and can be had, [qkv], (N, L, 3, H, D)
    mask: Tensor | None  # the operator's meaning: True, attend
    causal: bool  # the hint stands for the mask
    batched: bool
    batch_first: bool  # of the output; true for a call without batch


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    batch_first: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Project, attend, project. Checks come in PyTorch's order, so that of two mistakes the same one is reported."""
    check_mask_dtypes(key_padding_mask, attn_mask)
    if query.is_nested or key.is_nested or value.is_nested:
        plain = batch_first and bias_k is None and bias_v is None and not add_zero_attn
        if (
            not plain
            or query is not key
            or key is not value
            or in_proj_weight is None
            or key_padding_mask is not None
            or attn_mask is not None
            or query.layout != torch.strided
        ):
            raise AssertionError(
                "MultiheadAttention supports NestedTensor for self-attention only: query, key and value one strided "
                "NestedTensor, with batch_first=True and without masks, add_bias_kv, add_zero_attn, kdim and vdim."
            )
        return _nested_self_attention(
            query,
            num_heads,
            in_proj_weight,
            in_proj_bias,
            dropout_p,
            out_proj_weight,
            out_proj_bias,
            need_weights,
            average_attn_weights,
        )

    call = heads_and_mask(
        query,
        key,
        value,
        embed_dim,
        num_heads,
        in_proj_weight,
        q_proj_weight,
        k_proj_weight,
        v_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        batch_first,
        key_padding_mask,
        attn_mask,
        is_causal,
        not need_weights,
    )
    weights: Tensor | None = None
    if len(call.heads) == 1:
        out = torch.ops.torch_attn.self_attention(
            call.heads[0], attn_mask=call.mask, dropout_p=dropout_p, is_causal=call.causal
        )
    elif need_weights:
        q, k, v = call.heads
        out, weights = _attention_with_weights(q, k, v, call.mask, dropout_p, call.causal, average_attn_weights)
        weights = weights if call.batched else weights.squeeze(0)
    else:
        q, k, v = call.heads
        out = torch.ops.torch_attn.attention(q, k, v, attn_mask=call.mask, dropout_p=dropout_p, is_causal=call.causal)
    return project_output(out, out_proj_weight, out_proj_bias, call.batched, call.batch_first), weights


def heads_and_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    batch_first: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    together: bool,
) -> HeadsAndMask:
    """Check, project into heads, append keys, merge the masks.

    ``together``: q, k and v may stay in one tensor.
    """
    is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)
    if not is_batched:  # a batch of one, in which tensors that were one stay one
        batch_first = True
        query_is_key, value_is_key = query is key, value is key
        key = key.unsqueeze(0)
        query = key if query_is_key else query.unsqueeze(0)
        value = key if value_is_key else value.unsqueeze(0)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
            "`generate_square_subsequent_mask` to create this mask."
        )
    _check_inputs(query, key, value, embed_dim, in_proj_weight is None, batch_first)

    batch_dim, length_dim = (0, 1) if batch_first else (1, 0)
    batch, query_length, key_length = query.size(batch_dim), query.size(length_dim), key.size(length_dim)
    appended = (0 if bias_k is None else 1) + (1 if add_zero_attn else 0)
    heads: list[Tensor] = []
    if together and appended == 0 and key is value and query is key and in_proj_weight is not None:
        qkv = _project_together(query, num_heads, in_proj_weight, in_proj_bias)
        heads.append(qkv if batch_first else qkv.transpose(0, 1))
    else:
        q, k, v = _project_inputs(
            query, key, value, num_heads, in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, in_proj_bias
        )
        q, k, v = _heads_first(q, batch_first), _heads_first(k, batch_first), _heads_first(v, batch_first)
        heads += [q, k, v]

    # The hint replaces attn_mask only where the kernel's causal mask is what a true hint promises. Appended keys have
    # no place on the diagonal.
    causal = is_causal and appended == 0
    causal = causal and (key_padding_mask is None or query_length == key_length)
    per_head_mask: Tensor | None = None
    if attn_mask is not None and (not causal or key_padding_mask is not None):
        checked = _mask_per_head(attn_mask, batch, num_heads, query_length, key_length)
        per_head_mask = None if causal else checked
    if len(heads) == 3:
        heads[1], heads[2] = _append_keys(heads[1], heads[2], bias_k, bias_v, add_zero_attn, batch)
    if key_padding_mask is not None:
        _check_key_padding_mask(key_padding_mask, batch, key_length, appended)
        key_padding_mask = key_padding_mask.unsqueeze(1).unsqueeze(1)
    mask = _merge_masks(per_head_mask, key_padding_mask, appended)
    return HeadsAndMask(heads, mask, causal, is_batched, batch_first)


def project_output(
    out: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, batched: bool, batch_first: bool
) -> Tensor:
    """The kernel's output (..., N, H, L, D) to (..., N, L, E), (..., L, N, E) or, without batch, (..., L, E)."""
    # The kernel stores (N, L, H, D): a view when batch_first, and one copy otherwise.
    out = out.transpose(-3, -2) if batch_first else out.movedim(-2, -4)
    out = torch.ops.torch_attn.projection(out.flatten(-2).contiguous(), out_proj_weight, out_proj_bias)
    return out if batched else out.squeeze(-3)


def _nested_self_attention(
    x: Tensor,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    need_weights: bool,
    average_attn_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention of a strided NestedTensor (N, *, E), which is padded between the two projections only.

    nn.TransformerEncoder makes one of a padded batch in evaluation. The weights are dense, (N, L, L) or (N, H, L, L)
    with L the longest length, and 0 beyond each sequence's own.
    """
    sizes = x._nested_tensor_size()  # on the CPU, whatever the device
    lengths = sizes.select(1, 0).to(x.device)
    padded = F.linear(x, in_proj_weight, in_proj_bias).to_padded_tensor(0.0)
    q, k, v = padded.unflatten(-1, [3, num_heads, -1]).unbind(-3)
    q, k, v = _heads_first(q, True), _heads_first(k, True), _heads_first(v, True)
    weights: Tensor | None = None
    if need_weights:
        valid = torch.arange(padded.size(1), device=x.device) < lengths.unsqueeze(1)
        mask = (valid.unsqueeze(2) & valid.unsqueeze(1)).unsqueeze(1)
        out, weights = _attention_with_weights(q, k, v, mask, dropout_p, False, average_attn_weights)
    else:
        out = torch.ops.torch_attn.attention(q, k, v, dropout_p=dropout_p, key_lengths=lengths)
    nested = torch._nested_from_padded(out.transpose(1, 2).flatten(-2), sizes)
    return F.linear(nested, out_proj_weight, out_proj_bias), weights


def check_mask_dtypes(key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool and not torch.is_floating_point(key_padding_mask):
            raise AssertionError("only bool and floating types of key_padding_mask are supported")
        if attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=2,
            )
    if attn_mask is not None and attn_mask.dtype != torch.bool and not torch.is_floating_point(attn_mask):
        raise AssertionError("only bool and floating types of attn_mask are supported")


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, separate_weights: bool, batch_first: bool
) -> None:
    if query.size(-1) != embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {embed_dim}, but got {query.size(-1)}")
    if batch_first:  # the messages give sizes in PyTorch's inner order, (S, N, E)
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    if separate_weights:
        if key.shape[:2] != value.shape[:2]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
            )
    elif key.shape != value.shape:
        raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")


def _check_key_padding_mask(mask: Tensor, batch: int, key_length: int, appended: int) -> None:
    if mask.size(0) != batch:
        raise AssertionError(f"Expected key_padded_mask.shape[0] to be {batch}, but got {mask.size(0)}")
    if mask.size(1) != key_length:
        raise AssertionError(
            f"Expected key_padded_mask.shape[1] to be {key_length + appended}, but got {mask.size(1) + appended}"
        )


def _project_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    in_proj_weight: Tensor | None,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections, each (·, ·, H, D) in its input's order of batch and length.

    Packed weights project tensors that are the same in one product, of which q, k and v are strided views.
    """
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    if bias is not None:
        q_bias, k_bias, v_bias = bias.chunk(3)

    if in_proj_weight is None:
        if q_proj_weight is None or k_proj_weight is None or v_proj_weight is None:
            raise AssertionError("in_proj_weight is None, and so is one of q_proj_weight, k_proj_weight, v_proj_weight")
        q, k, v = F._in_projection(
            query, key, value, q_proj_weight, k_proj_weight, v_proj_weight, q_bias, k_bias, v_bias
        )
    elif key is value and query is key:
        q, k, v = _project_together(query, num_heads, in_proj_weight, bias).unbind(-3)
        return q, k, v
    elif key is value:
        embed_dim = query.size(-1)
        q_weight, kv_weight = in_proj_weight.split([embed_dim, 2 * embed_dim])
        kv_bias: Tensor | None = None
        if bias is not None:
            kv_bias = bias.narrow(0, embed_dim, 2 * embed_dim)
        q = torch.ops.torch_attn.projection(query, q_weight, q_bias).unflatten(-1, [num_heads, -1])
        kv = torch.ops.torch_attn.projection(key, kv_weight, kv_bias)
        k, v = kv.unflatten(-1, [2, num_heads, -1]).unbind(-3)
        return q, k, v
    else:
        q_weight, k_weight, v_weight = in_proj_weight.chunk(3)
        q, k, v = (
            torch.ops.torch_attn.projection(query, q_weight, q_bias),
            torch.ops.torch_attn.projection(key, k_weight, k_bias),
            torch.ops.torch_attn.projection(value, v_weight, v_bias),
        )
    heads = [num_heads, -1]
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


def _project_together(x: Tensor, num_heads: int, in_proj_weight: Tensor, bias: Tensor | None) -> Tensor:
    """(·, ·, 3, H, D): query, key and value of self-attention."""
    return torch.ops.torch_attn.projection(x, in_proj_weight, bias).unflatten(-1, [3, num_heads, -1])


def _heads_first(x: Tensor, batch_first: bool) -> Tensor:
    """(N, L, H, D) or (L, N, H, D) to (N, H, L, D), as a view."""
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _append_keys(
    k: Tensor, v: Tensor, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, batch: int
) -> tuple[Tensor, Tensor]:
    """k and v (N, H, S, D) with the learned key and value, then the zeros, appended along S."""
    _, heads, key_length, head_dim = k.shape
    if k.size(0) != batch:
        raise RuntimeError(
            f"shape '[{key_length}, {batch * heads}, {head_dim}]' is invalid for input of size {k.numel()}"
        )
    if bias_k is None and bias_v is not None:
        raise AssertionError("bias_v is set but bias_k is None")
    if bias_k is not None:
        if bias_v is None:
            raise AssertionError("bias_k is set but bias_v is None")
        # In k's dtype, which under autocast is not the parameter's.
        k = torch.cat([k, bias_k.to(k.dtype).view(1, heads, 1, head_dim).expand(batch, -1, -1, -1)], 2)
        v = torch.cat([v, bias_v.to(v.dtype).view(1, heads, 1, head_dim).expand(batch, -1, -1, -1)], 2)
    if add_zero_attn:
        k, v = F.pad(k, [0, 0, 0, 1]), F.pad(v, [0, 0, 0, 1])
    return k, v


def _mask_per_head(mask: Tensor, batch: int, num_heads: int, query_length: int, key_length: int) -> Tensor:
    """An attention mask (L, S) or (N·H, L, S) as (1, 1, L, S) or (N, H, L, S)."""
    if mask.dim() == 2:
        size_2d = (query_length, key_length)
        if mask.size(0) != query_length or mask.size(1) != key_length:
            raise RuntimeError(f"The shape of the 2D attn_mask is {mask.shape}, but should be {size_2d}.")
        return mask.unsqueeze(0).unsqueeze(0)
    size_3d = (batch * num_heads, query_length, key_length)
    if mask.size(0) != size_3d[0] or mask.size(1) != query_length or mask.size(2) != key_length:
        raise RuntimeError(f"The shape of the 3D attn_mask is {mask.shape}, but should be {size_3d}.")
    return mask.unflatten(0, [batch, num_heads])


def _merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, appended: int) -> Tensor | None:
    """One mask in the operator's meaning (True: attend), of no more than the broadcast size of the two given ones.

    Both are four-dimensional, with True meaning blocked. Appended keys are visible to every row.
    """
    mask = attn_mask
    if mask is None:
        mask = key_padding_mask
    elif key_padding_mask is not None:
        if mask.dtype == torch.bool and key_padding_mask.dtype == torch.bool:
            mask = mask | key_padding_mask
        elif mask.dtype == torch.bool:
            mask = key_padding_mask.masked_fill(mask, -math.inf)
        elif key_padding_mask.dtype == torch.bool:
            mask = mask.masked_fill(key_padding_mask, -math.inf)
        else:
            mask = mask + key_padding_mask
    if mask is not None and appended > 0:
        mask = F.pad(mask, [0, appended])
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()
    return mask


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, average: bool
) -> tuple[Tensor, Tensor]:
    """The kernel's output (N, H, L, D), and the weights that the same call used, dropout included.

    The weights are (N, H, L, S), or (N, L, S) for ``average``, their mean over the heads.
    """
    if dropout_p == 0.0:
        out, weights, _ = torch.ops.torch_attn.attention_with_weights_forward(
            q, k, v, attn_mask=mask, is_causal=is_causal, mean=average
        )
        return out, weights
    out, logsumexp, rng_state = torch.ops.torch_attn.attention_forward(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
    )
    weights = torch.ops.torch_attn.attention_weights(q, k, attn_mask=mask, is_causal=is_causal, logsumexp=logsumexp)
    batch, num_heads, query_length, key_length = weights.shape
    keep = torch.ops.torch_attn.dropout_keep_mask(rng_state, batch, num_heads, query_length, key_length, dropout_p)
    kept = weights * keep
    return out, (kept.mean(1) if average else kept) * dropout_scale(dropout_p)
