"""On a GPU: hard attention chooses the right keys, and its gradients are exact up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ..cases import CASE_BY_NAME, Case
from ..selection_oracle import (
    DTYPES,
    RULES,
    WITHOUT_DROPOUT,
    assert_gradients,
    assert_selected,
    gradient_weights,
    inputs_of,
    leaves_of,
    loss_of,
    noise_of,
)
from .test_on_gpu import pytestmark as needs_gpu

pytestmark = needs_gpu
ops = torch.ops.torch_attn


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.cuda() if isinstance(x, Tensor) else x for n, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WITHOUT_DROPOUT, ids=str)
def test_the_right_keys_with_their_log_probabilities(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    for rule in RULES.values():
        *results, state = (x.cpu() for x in ops.select_keys(**on_gpu(inputs), **rule))
        assert_selected(case, inputs, rule, tuple(results), noise_of(inputs, rule, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in WITHOUT_DROPOUT if c.name != "extreme_mask_rows"], ids=str)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    leaves = leaves_of(on_gpu(inputs))
    indices, *results, _ = ops.select_keys(**(on_gpu(inputs) | leaves), count=3, sample=True, replacement=True)
    weights = gradient_weights(case, results)
    grads = torch.autograd.grad(loss_of(weights, results), list(leaves.values()))
    named = {n: g.cpu() for n, g in zip(leaves, grads, strict=True)}
    assert_gradients(case, inputs, indices.cpu(), [w.cpu() for w in weights], named)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("name", ["plain", "causal_long", "window", "key_padding_mask", "everything"])
def test_the_choices_are_the_cpu_kernels(name: str, rule: dict[str, Any]) -> None:
    inputs = inputs_of(CASE_BY_NAME[name], torch.float64)
    state = torch.tensor([int(torch.randint(2**62, ())), 0, 0])
    here = ops.select_keys(**inputs, **rule, rng_state=state)[0]
    assert torch.equal(ops.select_keys(**on_gpu(inputs), **rule, rng_state=state.cuda())[0].cpu(), here)
