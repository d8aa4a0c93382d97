"""MultiheadAttention on strided NestedTensors, which PyTorch takes in its inference fast path only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_attn

from .cases import EMBED_DIM, HEADS, Case, ours


def nested_and_padded() -> tuple[Tensor, Tensor, Tensor]:
    """A batch as a strided NestedTensor, the same padded with zeros, and True where that is padding."""
    lengths = (5, 2, 3)
    nested = torch.nested.nested_tensor([torch.randn(n, EMBED_DIM, dtype=torch.float64) for n in lengths])
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    return nested, nested.to_padded_tensor(0.0), padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("weights", ["averaged", "per_head", "no_weights"])
def test_nested_tensors_give_what_pytorch_gives_in_inference(weights: str) -> None:
    case = Case("batch_first", weights=weights)
    theirs, arguments = case.build().eval(), case.inputs()
    arguments["query"] = arguments["key"] = arguments["value"] = nested_and_padded()[0]
    with torch.no_grad():
        expected, expected_weights = theirs(**arguments)
        actual, actual_weights = ours(theirs)(**arguments)
    assert actual.is_nested
    torch.testing.assert_close(actual.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    torch.testing.assert_close(actual_weights, expected_weights)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_have_gradients() -> None:
    module = ours(Case("batch_first").build())
    nested, padded, padding = nested_and_padded()
    out, _ = module(nested, nested, nested, need_weights=False)
    actual = torch.autograd.grad(out.to_padded_tensor(0.0).square().sum(), list(module.parameters()))
    out, _ = module(padded, padded, padded, key_padding_mask=padding, need_weights=False)
    out = out.masked_fill(padding.unsqueeze(-1), 0.0)
    expected = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_outside_self_attention_raise(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, EMBED_DIM), torch.randn(3, EMBED_DIM)], layout=layout)
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=layout is torch.jagged)
    with pytest.raises(AssertionError, match="MultiheadAttention supports NestedTensor for self-attention only"):
        module(nested, nested, nested)
