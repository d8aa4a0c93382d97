"""Dropout of MultiheadAttention: the returned weights are those that made the output of the same call."""

from __future__ import annotations

import math

import pytest
import torch

import torch_attn

from .cases import EMBED_DIM, HEADS, Case, detached, output_from

P = round(0.4 * 2**16) / 2**16  # what 0.4 is rounded to, see docs/semantics.md
CASES = [
    Case(weights="per_head"),
    Case("plain", "cross", "float", "float", "per_head"),
    Case("bias_kv_zero_attn", "cross", "bool", "bool", "per_head"),
    Case("kdim_vdim", "separate", weights="per_head", batched=False),
]


def module_with_dropout(case: Case, p: float = P) -> torch_attn.MultiheadAttention:
    module = torch_attn.MultiheadAttention.__new__(torch_attn.MultiheadAttention)
    module.__setstate__(case.build(dropout=p).__getstate__())
    return module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_reproduce_the_output_of_the_same_call(case: Case) -> None:
    module, arguments = module_with_dropout(case), case.inputs()
    out, weights = module(**arguments)
    assert (weights == 0).any()
    torch.testing.assert_close(out, output_from(module, arguments["value"], weights))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kept_weights_are_scaled_up_and_the_others_zero(case: Case) -> None:
    module, arguments = module_with_dropout(case), case.inputs()
    _, weights = module(**arguments)
    _, undropped = module.eval()(**arguments)
    torch.testing.assert_close(weights, torch.where(weights == 0, 0.0, undropped / (1 - P)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_through_output_and_weights_are_those_of_the_bits_drawn(case: Case) -> None:
    module, arguments = module_with_dropout(case), case.inputs()
    torch.manual_seed(7)
    out, weights = module(**arguments)
    cotangents = torch.randn_like(out), torch.randn_like(weights)
    actual = torch.autograd.grad((out, weights), list(module.parameters()), cotangents, retain_graph=True)

    _, undropped = module.eval()(**arguments)
    expected_weights = undropped * (weights != 0) / (1 - P)
    expected_out = output_from(module, arguments["value"], expected_weights)
    expected = torch.autograd.grad((expected_out, expected_weights), list(module.parameters()), cotangents)
    for (name, _), x, y in zip(module.named_parameters(), actual, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}")


def test_share_of_dropped_weights_is_p() -> None:
    length = 64
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, dropout=P, batch_first=True)
    x = torch.randn(4, length, EMBED_DIM)
    _, weights = module(x, x, x, average_attn_weights=False)
    count = weights.numel()
    share = (weights == 0).float().mean().item()
    assert abs(share - P) < 6 * math.sqrt(P * (1 - P) / count)  # false alarm: 2e-9


def test_mean_over_many_calls_is_the_output_without_dropout() -> None:
    module, arguments = module_with_dropout(Case(weights="no_weights")), Case(weights="no_weights").inputs()
    with torch.no_grad():
        draws = torch.stack([module(**arguments)[0] for _ in range(400)])
        expected, _ = module.eval()(**arguments)
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert error.max() < 7


@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_same_seed_drops_the_same_weights(weights: str) -> None:
    case = Case(weights=weights)
    module, arguments = module_with_dropout(case), case.inputs()
    torch.manual_seed(11)
    first, _ = module(**arguments)
    second, _ = module(**arguments)
    torch.manual_seed(11)
    again, _ = module(**arguments)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_evaluation_drops_nothing(weights: str) -> None:
    case = Case(weights=weights)
    module, arguments = module_with_dropout(case).eval(), case.inputs()
    without = module_with_dropout(case, 0.0).train()
    without.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(**arguments), without(**detached(arguments)))


def test_dropping_everything_leaves_the_output_bias() -> None:
    case = Case()
    module, arguments = module_with_dropout(case, 1.0), case.inputs()
    out, weights = module(**arguments)
    assert not weights.any()
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))
