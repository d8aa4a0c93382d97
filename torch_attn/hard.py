"""Hard attention: each query reads a few keys, chosen by their scores, instead of a mixture of all.

TorchScript compiles a call of :func:`hard_attention` to the operator itself, whose result has the same field names.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.jit._builtins
from torch import Tensor

from .functional import CausalAlignment

Estimator = Literal["reinforce", "straight_through", "argmax", "top_k"]


class HardAttention(NamedTuple):
    """What :func:`hard_attention` returns."""

    output: Tensor
    indices: Tensor
    log_prob: Tensor
    entropy: Tensor


def hard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: CausalAlignment = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    estimator: Estimator = "reinforce",
    num_samples: int = 1,
    replacement: bool = True,
    k: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    enable_gqa: bool = False,
) -> HardAttention:
    """Attention that reads the values of single keys: drawn from P = softmax(scores / temperature), or the highest.

    The scores are those of :func:`torch_attn.attention`, which also explains the options up to ``key_lengths``. Draws
    are exact samples of P, made in one pass over the keys by the Gumbel-max trick. They depend on the seed alone, not
    on threads or instruction sets (but a score that rounds differently may tip a draw that was that close).

    What is differentiable, by ``estimator``:

    - "reinforce": draws keys. ``output`` has a gradient for ``value`` only; query and key learn through ``log_prob``:
      ``-(reward.detach() * log_prob).mean()`` is the loss of REINFORCE (Williams 1992; Xu et al. 2015, "Show, Attend
      and Tell", eq. 11).
    - "straight_through": draws keys. In backward, query, key, a floating mask, slopes and sinks receive the gradient
      that soft attention, softmax(scores / temperature) · value, would give them, as if it had made the output; value
      receives its gradient at the drawn keys only (Bengio et al. 2013, "Estimating or Propagating Gradients Through
      Stochastic Neurons", §4). Biased, of low variance.
    - "argmax": takes the key of the highest score; for evaluation.
    - "top_k": takes the k keys of the highest scores, weighted by the softmax over these alone. The gradients of
      ``output`` are exact, for all inputs, where the choice does not change.

    ``log_prob`` and ``entropy`` are differentiable with every estimator, to any order.

    Args:
        query: (..., Hq, L, D), float64, float32, bfloat16 or float16. Leading dimensions broadcast.
        key: (..., Hkv, S, D), of query's dtype and device.
        value: (..., Hkv, S, Dv).
        attn_mask, is_causal, scale, window_left, window_right, causal_alignment, alibi_slopes, softcap, key_lengths:
            as in :func:`torch_attn.attention`.
        sinks: (Hq), a logit per head: one more candidate, which has no value. When it is chosen, the index is −1 and
            the output 0 ("look nowhere").
        estimator: see above.
        num_samples: n, how many keys a query draws; "argmax" and "top_k" do not read it.
        replacement: True: the draws are independent. False: they are different keys, in the order in which they would
            be drawn one after the other (Gumbel-top-k, Kool et al. 2019).
        k: how many keys "top_k" takes.
        temperature: positive; divides the scores, ALiBi and mask included.
        generator: draws the seed, on query's device; None: PyTorch's default generator, as ``torch.manual_seed`` sets
            it.
        enable_gqa: allow Hq to be a multiple of Hkv; query head h reads key head h // (Hq / Hkv).

    Returns:
        A :class:`HardAttention` of

        - ``output``: (..., Hq, L, Dv) in query's dtype; (n, ..., Hq, L, Dv) when n > 1, one for each draw.
        - ``indices``: int64, output's shape without Dv; (..., Hq, L, k) for "top_k", by falling score. −1, with output
          0 and log_prob 0, where no key is left to choose: in rows with nothing to attend, and when more keys are drawn
          without replacement, or taken by "top_k", than a row attends. Of equal scores the lowest index wins.
        - ``log_prob``: indices' shape, float32 (float64 for float64): log P of the chosen key. Without replacement,
          too, it is the log-probability under the full softmax, which Kool et al.'s estimators start from.
        - ``entropy``: (..., Hq, L), of P in nats (sink included); 0 for a row with nothing to attend.

    Raises:
        ValueError: a number or string out of its range.
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    return HardAttention(
        *torch.ops.torch_attn.hard_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            window_left=window_left,
            window_right=window_right,
            causal_alignment=causal_alignment,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            sinks=sinks,
            key_lengths=key_lengths,
            estimator=estimator,
            num_samples=num_samples,
            replacement=replacement,
            k=k,
            temperature=temperature,
            generator=generator,
            enable_gqa=enable_gqa,
        )
    )


torch.jit._builtins._register_builtin(hard_attention, "torch_attn::hard_attention")
