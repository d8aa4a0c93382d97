"""What the class MultiheadAttention shares with PyTorch's beside its results: parameters, attributes, state."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import torch_attn

from .cases import EMBED_DIM, HEADS, MODULES, Case, ours


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_same_seed_gives_the_same_parameters_bit_for_bit(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    after_theirs = torch.rand(1)
    torch.manual_seed(3)
    mine = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    assert torch.equal(torch.rand(1), after_theirs), "a different number of random draws"
    expected = theirs.state_dict()
    assert list(mine.state_dict()) == list(expected)
    assert all(torch.equal(x, expected[name]) for name, x in mine.state_dict().items())


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_attributes_are_those_of_pytorch(options: dict[str, Any]) -> None:
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, dropout=0.25, **options)
    mine = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, dropout=0.25, **options)
    assert isinstance(mine, nn.MultiheadAttention)
    assert list(vars(mine)) == list(vars(theirs))
    plain = {n: x for n, x in vars(theirs).items() if isinstance(x, (int, float, bool, str, type(None)))}
    assert {n: vars(mine)[n] for n in plain} == plain
    assert type(mine.out_proj) is type(theirs.out_proj)
    for method in ("__init__", "forward", "merge_masks"):
        theirs_signature = inspect.signature(getattr(nn.MultiheadAttention, method))
        mine_signature = inspect.signature(getattr(torch_attn.MultiheadAttention, method))
        assert list(mine_signature.parameters) == list(theirs_signature.parameters)
        for name, parameter in mine_signature.parameters.items():
            assert parameter.default == theirs_signature.parameters[name].default


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_state_dict_loads_strictly_in_both_directions(options: dict[str, Any]) -> None:
    theirs = nn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    mine = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    fresh = nn.MultiheadAttention(EMBED_DIM, HEADS, **options)
    fresh.load_state_dict(mine.state_dict(), strict=True)
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in fresh.state_dict().items())


def test_state_without_qkv_same_embed_dim_loads_as_packed() -> None:
    """Pickles of torch 1.1 lack the attribute."""
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS)
    state = module.__getstate__()
    del state["_qkv_same_embed_dim"]
    fresh = torch_attn.MultiheadAttention.__new__(torch_attn.MultiheadAttention)
    fresh.__setstate__(state)
    assert fresh._qkv_same_embed_dim is True


def test_pickle_keeps_class_and_values() -> None:
    case = Case("bias_kv", "cross")
    module, arguments = ours(case.build()), case.inputs()
    copy = pickle.loads(pickle.dumps(module))
    assert type(copy) is torch_attn.MultiheadAttention
    assert torch.equal(copy(**arguments)[0], module(**arguments)[0])
