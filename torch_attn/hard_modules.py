"""HardMultiheadAttention: MultiheadAttention's projections and masks around attention that reads discrete keys.

How to train it is torch_attn/reinforce.py's subject; docs/hard_attention.md shows both together.
"""

# No "from __future__ import annotations": TorchScript reads the annotations as types, not as strings.
from typing import get_args

import torch
from torch import Tensor, nn

from ._multi_head_attention import check_mask_dtypes, heads_and_mask, project_output
from .hard import Estimator, HardAttention

ESTIMATORS = get_args(Estimator)


class HardMultiheadAttention(nn.MultiheadAttention):
    r"""Multi-head attention in which each query of each head reads one key (or the best k), not a mixture of all.

    Per head, with scores s = QKᵀ / sqrt(E / H) under the masks and the policy π = softmax(s / temperature), the output
    of row i is the value of key aᵢ:

    - in training with ``"reinforce"`` or ``"straight_through"``, aᵢ is a sample of πᵢ, drawn anew in every call;
    - in evaluation, and in training with ``"argmax"``, aᵢ is the most probable key, the lowest index among equals;
    - with ``"top_k"``, always, the k most probable keys are read with their probabilities, renormalised.

    What trains the choice:

    - ``"reinforce"``: nothing in the output. Put :func:`torch_attn.reinforce_loss` of the returned ``log_prob``, which
      is differentiable, and of a reward into the loss: an unbiased gradient of the expected reward (Williams 1992).
    - ``"straight_through"``: the output's gradient is that of soft attention with the weights π (Bengio et al. 2013):
      biased, of low variance, and needs no reward.
    - ``"argmax"``: nothing in the output either; its ``log_prob`` is differentiable too.
    - ``"top_k"``: the output's gradient, which is exact among the keys that were read.

    Parameters, their initialisation and state_dict are :class:`torch.nn.MultiheadAttention`'s, so weights load from one
    to the other. In an nn.TransformerEncoderLayer, whose fast path in evaluation would read the weights past this
    module, call :func:`torch_attn.replace_mha` on the model: it closes the path, and leaves this module as it is. The
    layer passes on ``output`` alone; a forward hook on this module sees ``log_prob``.

    Args:
        embed_dim: total dimension of the model, E.
        num_heads: number of heads H; each has dimension E / H and chooses for itself.
        dropout: must be 0, as there are no weights to drop; here to keep the place of the arguments after it.
        bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in MultiheadAttention. Appended
            keys have the indices S and up: with ``add_zero_attn`` a query may choose to read nothing.
        estimator: "reinforce", "straight_through", "argmax" or "top_k".
        num_samples: choices drawn for each query in training, each with an output of its own.
        replacement: draw the samples of a query independently; False: all different (Gumbel-top-k, Kool et al. 2019).
            When it runs out of keys that it may attend, the index is −1, as with "top_k".
        k: number of keys that "top_k" reads.
        temperature: divides the scores, in training and evaluation. The attributes ``temperature``, ``estimator``,
            ``num_samples``, ``replacement`` and ``k`` may be changed between calls.

    Raises:
        ValueError: naming the argument that cannot be.

    Sources: Xu et al. 2015, "Show, Attend and Tell", section 4.1; Williams 1992, "Simple statistical gradient-following
    algorithms for connectionist reinforcement learning"; Bengio et al. 2013, "Estimating or Propagating Gradients
    Through Stochastic Neurons"; Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        estimator: Estimator = "reinforce",
        num_samples: int = 1,
        replacement: bool = True,
        k: int = 1,
        temperature: float = 1.0,
    ) -> None:
        if dropout != 0.0:
            raise ValueError(f"dropout must be 0, as hard attention has no weights to drop, but is {dropout}.")
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, but is {estimator!r}.")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, but is {num_samples}.")
        if k < 1:
            raise ValueError(f"k must be at least 1, but is {k}.")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, but is {temperature}.")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.estimator = estimator
        self.num_samples = num_samples
        self.replacement = replacement
        self.k = k
        self.temperature = float(temperature)

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}, num_samples={self.num_samples}, temperature={self.temperature}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> HardAttention:
        r"""Choose keys for ``query``, and read their values.

        Args:
            query: (L, E), (L, N, E), or (N, L, E) when ``batch_first``.
            key: (S, kdim), (S, N, kdim) or (N, S, kdim).
            value: (S, vdim), (S, N, vdim) or (N, S, vdim).
            key_padding_mask: (N, S), or (S) for an unbatched query; bool (True: the key is *ignored*) or floating
                (added to the scores).
            need_weights: must be False: the choice is in ``indices``. Here, with average_attn_weights, so that the
                module takes a call of MultiheadAttention's.
            attn_mask: (L, S) or (N·H, L, S), batch-major; bool (True: *not* attended) or floating (added).
            is_causal: a hint that ``attn_mask``, which must be given, is the causal mask.

        Returns:
            A named tuple. Without N for an unbatched query; with a leading ``num_samples`` (all but ``entropy``) when
            that is more than 1 and samples are drawn.

            - ``output``: of query's shape.
            - ``indices``: (N, H, L), int64, the key that was read; −1 for a row with nothing to attend, which reads 0
              (``output`` is ``out_proj.bias`` where all heads do). "top_k": (N, H, L, k), the best first.
            - ``log_prob``: of indices' shape, float32 (float64 for float64), log π of each key read, differentiable; 0
              where the index is −1.
            - ``entropy``: (N, H, L), that of π in nats, differentiable; 0 for a row with nothing to attend.
        """
        if need_weights:
            raise ValueError("need_weights must be False: hard attention has no weights, and returns indices instead.")
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "query, key and value must be dense, but one is a NestedTensor: pad it and give key_padding_mask."
            )
        check_mask_dtypes(key_padding_mask, attn_mask)
        call = heads_and_mask(
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
            self.batch_first,
            key_padding_mask,
            attn_mask,
            is_causal,
            False,
        )
        q, k, v = call.heads
        deterministic = not self.training and self.estimator != "top_k"
        output, indices, log_prob, entropy = torch.ops.torch_attn.hard_attention(
            q,
            k,
            v,
            attn_mask=call.mask,
            is_causal=call.causal,
            estimator="argmax" if deterministic else self.estimator,
            num_samples=1 if deterministic else self.num_samples,
            replacement=self.replacement,
            k=self.k,
            temperature=self.temperature,
        )
        output = project_output(output, self.out_proj.weight, self.out_proj.bias, call.batched, call.batch_first)
        if not call.batched:
            batch_dim = indices.dim() - (4 if self.estimator == "top_k" else 3)
            indices, log_prob, entropy = indices.squeeze(batch_dim), log_prob.squeeze(batch_dim), entropy.squeeze(0)
        return HardAttention(output, indices, log_prob, entropy)
