"""MultiheadAttention: nn.MultiheadAttention's contract on this library's kernels.

Only ``forward`` differs from PyTorch's class, so parameters, their initialisation, state_dict and attributes are the
parent's own.
"""

# No "from __future__ import annotations": TorchScript reads the annotations as types, not as strings.
from torch import Tensor, nn

from ._multi_head_attention import multi_head_attention


class MultiheadAttention(nn.MultiheadAttention):
    r"""Drop-in for :class:`torch.nn.MultiheadAttention`: same arguments, parameters, state_dict, masks and errors.

    The output, and its gradients, come from the fused kernels whether or not the weights are asked for. PyTorch's
    inference fast path is not used. In a stock :class:`~torch.nn.TransformerEncoderLayer`, install this module with
    :func:`torch_attn.replace_mha`: set by hand, the layer's own fast path would read the weights past it.

    Args:
        embed_dim: total dimension of the model, E.
        num_heads: number of heads H; each has dimension E / H.
        dropout: probability of dropping an attention weight in training, rounded to a multiple of 2⁻¹⁶.
        bias: add a bias to the input and output projections.
        add_bias_kv: append a learned key and value to the sequences.
        add_zero_attn: append a key and a value of zeros to the sequences.
        kdim: features of the keys; E when None.
        vdim: features of the values; E when None.
        batch_first: inputs and output are (N, L, E) instead of (L, N, E).
        device, dtype: of the parameters.

    What differs from PyTorch's module, on purpose:

    - A row whose every key is masked has weights 0 and attention output 0 (the module returns ``out_proj.bias`` there),
      and gradients 0. PyTorch returns NaN with ``need_weights=True``.
    - With ``add_bias_kv`` or ``add_zero_attn`` the appended keys stay visible under ``is_causal=True``, as they do
      under a mask. PyTorch hides them with ``need_weights=False``.
    - ``is_causal=True`` is trusted with a ``key_padding_mask`` too where L = S, so that the (L, S) mask is never merged
      with the padding. PyTorch reads ``attn_mask`` then. The two agree whenever the hint is true.
    - The output is contiguous whatever ``batch_first`` is. Mask dtypes may differ from the query's.
    - Strided NestedTensors are taken in training and under autograd too, not only in inference.
    - Returned weights are computed in float32 (float64 for float64) and rounded once, or once more by dropout's factor.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
    """

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
        r"""Attend ``query`` to ``key`` and ``value``.

        Args:
            query: (L, E), (L, N, E), or (N, L, E) when ``batch_first``.
            key: (S, kdim), (S, N, kdim) or (N, S, kdim).
            value: (S, vdim), (S, N, vdim) or (N, S, vdim).
            key_padding_mask: (N, S), or (S) for an unbatched query; bool (True: the key is *ignored*) or floating
                (added to the scores).
            need_weights: also return the attention weights. They are computed from the output's logsumexp; averaged,
                and without dropout, the (N, H, L, S) matrix is never stored.
            attn_mask: (L, S) or (N·H, L, S), batch-major; bool (True: *not* attended) or floating (added).
            average_attn_weights: average the returned weights over the heads.
            is_causal: a hint that ``attn_mask``, which must be given, is the causal mask. Where the hint can be used
                the mask is not read: row i attends keys 0 to i.

        Returns:
            The output, of query's shape, and the weights: (N, L, S) or (N, H, L, S), without N for an unbatched query,
            after dropout and differentiable; None without ``need_weights``. S counts the appended keys.
        """
        return multi_head_attention(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
            self.out_proj.weight,
            self.out_proj.bias,
            self.batch_first,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
