"""attention_rollout: Abnar & Zuidema 2020, section 3, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_attn
from torch_attn import attention_rollout

LAYERS, BATCH, HEADS, LENGTH = 3, 2, 4, 5


def random_maps(*sizes: int) -> list[Tensor]:
    return [torch.rand(*sizes, LENGTH, LENGTH, dtype=torch.float64).softmax(-1) for _ in range(LAYERS)]


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_multiplies_the_layers(heads: str, residual: float) -> None:
    maps = random_maps(BATCH, HEADS)
    expected = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, -1, -1)
    for layer in maps:  # the paper's recursion: the newest layer from the left
        one = {"mean": layer.mean(1), "max": layer.max(1).values, "min": layer.min(1).values}[heads]
        one = (1 - residual) * one + residual * torch.eye(LENGTH, dtype=torch.float64)
        expected = (one / one.sum(-1, keepdim=True)) @ expected
    actual = attention_rollout(maps, heads=heads, residual=residual)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual.sum(-1), torch.ones(BATCH, LENGTH, dtype=torch.float64))


def test_maps_without_heads() -> None:
    maps = random_maps(BATCH, HEADS)
    averaged = [layer.mean(1) for layer in maps]
    torch.testing.assert_close(attention_rollout(averaged, heads="none"), attention_rollout(maps))


def test_the_order_of_layers_matters() -> None:
    """Layer 1 copies token 0 to token 1, layer 2 token 1 to token 2: through both, token 2 is made of token 0."""
    first, second = torch.eye(3), torch.eye(3)
    first[1] = torch.tensor([1.0, 0.0, 0.0])
    second[2] = torch.tensor([0.0, 1.0, 0.0])
    assert attention_rollout([first, second], heads="none", residual=0.0)[2].tolist() == [1.0, 0.0, 0.0]
    assert attention_rollout([second, first], heads="none", residual=0.0)[2].tolist() == [0.0, 1.0, 0.0]


def test_rows_that_attend_nothing_keep_their_own_token() -> None:
    empty = torch.zeros(1, LENGTH, LENGTH)
    torch.testing.assert_close(attention_rollout([empty, empty]), torch.eye(LENGTH))
    assert not attention_rollout([empty], residual=0.0).any()


def test_half_precision_is_multiplied_in_float32() -> None:
    maps = [layer.bfloat16() for layer in random_maps(HEADS)]
    assert attention_rollout(maps).dtype == torch.float32


def test_rollout_of_a_recorded_model() -> None:
    layer = nn.TransformerEncoderLayer(16, HEADS, 32, batch_first=True)
    model = torch_attn.replace_mha(nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)).eval()
    with torch.no_grad(), torch_attn.record_attention(model) as record:
        model(torch.randn(BATCH, LENGTH, 16))
    rollout = attention_rollout(record.last_maps())
    assert rollout.shape == (BATCH, LENGTH, LENGTH)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(BATCH, LENGTH))


@pytest.mark.parametrize(
    "maps,options,message",
    [
        ([], {}, "maps is empty"),
        ([torch.rand(2, 3, 4)], {}, r"maps\[0\] is \(2, 3, 4\), but must be \(..., H, L, L\)"),
        ([torch.rand(3, 3)], {}, r"maps\[0\] is \(3, 3\)"),
        ([torch.rand(1, 3, 3), torch.rand(1, 4, 4)], {}, r"maps\[1\] is \(1, 4, 4\), which does not fit"),
        ([torch.rand(1, 3, 3)], {"heads": "sum"}, "heads is 'sum'"),
        ([torch.rand(1, 3, 3)], {"residual": 1.0}, "residual is 1.0"),
    ],
)
def test_mistakes_are_named(maps: list[Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_rollout(maps, **options)
