"""torch_attn.scaled_dot_product_attention is torch.nn.functional's: same signature, same answers."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import torch.nn.functional as F

import torch_attn

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
    "bool_mask": {"attn_mask": torch.rand(9, 9) > 0.3},
    "float_mask": {"attn_mask": torch.randn(3, 9, 9, dtype=torch.float64)},
    "positional_mask": {"attn_mask": torch.randn(1, 9, dtype=torch.float64)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_torch(options: dict) -> None:
    inputs = [torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = torch_attn.scaled_dot_product_attention(*inputs, **options)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_queries_equal_torch() -> None:
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8)
    torch.testing.assert_close(
        torch_attn.scaled_dot_product_attention(query, key, key, enable_gqa=True),
        F.scaled_dot_product_attention(query, key, key, enable_gqa=True),
    )


def test_signature_is_torchs() -> None:
    documented = (
        "scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, "
        "is_causal=False, scale=None, enable_gqa=False)"
    )
    assert documented in re.sub(r"\s+", " ", F.scaled_dot_product_attention.__doc__ or "")
    parameters = inspect.signature(torch_attn.scaled_dot_product_attention).parameters
    rendered = ", ".join(n if p.default is p.empty else f"{n}={p.default}" for n, p in parameters.items())
    assert f"scaled_dot_product_attention({rendered})" == documented
    assert [n for n, p in parameters.items() if p.kind == p.KEYWORD_ONLY] == ["scale", "enable_gqa"]


def test_logsumexp_is_returned_when_asked() -> None:
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    out, logsumexp = torch_attn.attention(query, key, value, return_logsumexp=True)
    torch.testing.assert_close(out, torch_attn.attention(query, key, value))
    torch.testing.assert_close(logsumexp, (query @ key.mT / 2).logsumexp(-1))


def test_both_functions_compile_to_their_operator_in_torchscript() -> None:
    def function(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch_attn.attention(q, q, q, attn_mask=mask, softcap=3.0, window_left=2)
        return torch_attn.scaled_dot_product_attention(x, q, q, scale=0.5)

    scripted = torch.jit.script(function)
    graph = str(scripted.graph)
    assert "torch_attn::attention(" in graph and "torch_attn::scaled_dot_product_attention(" in graph
    query, mask = torch.randn(1, 2, 5, 4), torch.randn(5, 5)
    torch.testing.assert_close(scripted(query, mask), function(query, mask))
