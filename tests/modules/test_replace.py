"""replace_mha and restore_mha: what must survive them, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torch_attn
from torch_attn import replace_mha, restore_mha

EMBED_DIM, HEADS = 8, 2


class Model(nn.Module):
    """Two attention modules, one of which is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
        self.shared = nn.ModuleList([nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)] * 2)
        self.head = nn.Linear(EMBED_DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, x, x)[0]
        for attention in self.shared:
            x = x + attention(x, x, x)[0]
        return self.head(x)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, EMBED_DIM)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


def kernel_calls() -> int:
    return torch.ops.torch_attn.kernel_calls()


def test_every_module_is_replaced_in_place_and_the_kernel_runs(model: Model, x: Tensor) -> None:
    expected = model(x)
    assert replace_mha(model) is model
    assert [type(m) for m in attention_modules(model)] == [torch_attn.MultiheadAttention] * 2
    before = kernel_calls()
    torch.testing.assert_close(model(x), expected)
    assert kernel_calls() == before + 3


def test_shared_modules_stay_shared(model: Model) -> None:
    replace_mha(model)
    assert model.shared[0] is model.shared[1]


def test_a_module_that_is_the_model_is_replaced() -> None:
    module = nn.MultiheadAttention(EMBED_DIM, HEADS)
    assert isinstance(replace_mha(module), torch_attn.MultiheadAttention)
    assert type(restore_mha(module)) is nn.MultiheadAttention


def test_parameters_stay_the_same_objects(model: Model, x: Tensor) -> None:
    before = dict(model.named_parameters())
    replace_mha(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_an_optimizer_made_before_trains_the_replaced_model(model: Model, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    replace_mha(model)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        for _ in range(3):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_flags_buffers_and_dtypes_stay(model: Model) -> None:
    model.first.eval().double().register_buffer("extra", torch.ones(1))
    model.first.in_proj_bias.requires_grad_(False)
    replace_mha(model)
    assert not model.first.training and model.shared[0].training
    assert model.first.extra.item() == 1
    assert model.first.in_proj_weight.dtype == torch.float64
    assert not model.first.in_proj_bias.requires_grad and model.first.in_proj_weight.requires_grad


def test_hooks_stay_and_run(model: Model, x: Tensor) -> None:
    seen: list[str] = []
    model.first.register_forward_pre_hook(lambda *_: seen.append("forward_pre"))
    model.first.register_forward_hook(lambda *_: seen.append("forward"))
    model.first.register_full_backward_pre_hook(lambda *_: seen.append("backward_pre"))
    handle = model.first.register_full_backward_hook(lambda *_: seen.append("backward"))
    x.requires_grad_()
    replace_mha(model)(x).sum().backward()
    assert seen == ["forward_pre", "forward", "backward_pre", "backward"]
    handle.remove()
    model(x).sum().backward()
    assert seen[4:] == ["forward_pre", "forward", "backward_pre"]


@pytest.mark.parametrize("restored", [False, True], ids=["replaced", "restored"])
@pytest.mark.parametrize("tensor_name", ["in_proj_weight", "out_proj.weight"])
def test_parametrizations_stay_and_can_be_removed_later(
    model: Model, x: Tensor, tensor_name: str, restored: bool
) -> None:
    owner_name, _, name = f"first.{tensor_name}".rpartition(".")
    owner = model.get_submodule(owner_name)
    parametrizations.weight_norm(owner, name)
    originals = list(owner.parametrizations[name].parameters())
    expected = model(x)
    replace_mha(model)
    before = kernel_calls()
    torch.testing.assert_close(model(x), expected)
    assert kernel_calls() == before + 3
    if restored:
        assert torch.equal(restore_mha(model)(x), expected)
    assert all(a is b for a, b in zip(owner.parametrizations[name].parameters(), originals, strict=True))
    parametrize.remove_parametrizations(owner, name)
    assert type(model.first) is (nn.MultiheadAttention if restored else torch_attn.MultiheadAttention)
    torch.testing.assert_close(model(x), expected)


def test_weight_norm_by_hooks_stays(model: Model, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.first, "in_proj_weight")
    expected = model(x)
    torch.testing.assert_close(replace_mha(model)(x), expected)


def test_replacing_twice_changes_nothing(model: Model) -> None:
    layer = nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, batch_first=True)
    model.add_module("layer", layer)
    state = copy.deepcopy(vars(replace_mha(layer)))
    replace_mha(model)
    once = [type(m) for m in model.modules()]
    assert [type(m) for m in replace_mha(model).modules()] == once
    assert {n: x for n, x in vars(layer).items() if isinstance(x, int)} == {
        n: x for n, x in state.items() if isinstance(x, int)
    }


def test_restore_is_the_inverse(model: Model, x: Tensor) -> None:
    model.add_module("layer", nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, batch_first=True, activation="gelu"))
    types = [type(m) for m in model.modules()]
    layer_state = {n: v for n, v in vars(model.layer).items() if isinstance(v, int)}
    expected, state = model(x), {n: v.clone() for n, v in model.state_dict().items()}
    assert restore_mha(replace_mha(model)) is model
    assert [type(m) for m in model.modules()] == types
    assert {n: v for n, v in vars(model.layer).items() if isinstance(v, int)} == layer_state
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    before = kernel_calls()
    assert torch.equal(model(x), expected)
    assert kernel_calls() == before


def test_restoring_an_untouched_model_changes_nothing(model: Model) -> None:
    assert [type(m) for m in attention_modules(restore_mha(model))] == [nn.MultiheadAttention] * 2


def copy_by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def copy_by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def copy_by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copier", [copy_by_deepcopy, copy_by_pickle, copy_by_torch_save])
def test_copies_of_a_replaced_model_stay_replaced_and_can_be_restored(copier: Any) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED_DIM, HEADS, 16, batch_first=True), 2).eval()
    x = torch.randn(3, 5, EMBED_DIM)
    with torch.no_grad():
        expected = model(x)
        twin = copier(replace_mha(model))
        before = kernel_calls()
        torch.testing.assert_close(twin(x), expected)
        assert kernel_calls() == before + 2
        torch.testing.assert_close(restore_mha(twin)(x), expected)
        assert kernel_calls() == before + 2


def test_state_dict_of_a_replaced_model_loads_into_an_untouched_one(model: Model) -> None:
    untouched = Model()
    untouched.load_state_dict(replace_mha(model).state_dict(), strict=True)
    model.load_state_dict(untouched.state_dict(), strict=True)


class Overriding(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_subclasses_are_left_alone_with_a_warning(model: Model) -> None:
    model.first = Overriding(EMBED_DIM, HEADS)
    with pytest.warns(UserWarning, match="left first as it is: Overriding is a subclass of nn.MultiheadAttention"):
        replace_mha(model)
    assert type(model.first) is Overriding
    assert type(model.shared[0]) is torch_attn.MultiheadAttention


def test_a_forward_replaced_on_the_instance_is_left_alone_with_a_warning(model: Model) -> None:
    model.first.forward = model.first.forward
    with pytest.warns(UserWarning, match="left first as it is: its forward was replaced on the instance"):
        replace_mha(model)
    assert type(model.first) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_left_alone_with_a_warning(model: Model) -> None:
    scripted = torch.jit.script(model)
    with pytest.warns(UserWarning) as caught:
        replace_mha(scripted)
    for name, warning in zip(("first", "shared.0", "shared.1"), caught, strict=True):
        assert f"left {name} as it is: it was compiled by torch.jit.script" in str(warning.message)


def test_subclasses_of_this_library_are_no_concern_of_it(model: Model, recwarn: pytest.WarningsRecorder) -> None:
    class Own(torch_attn.MultiheadAttention):
        pass

    model.first = Own(EMBED_DIM, HEADS)
    restore_mha(replace_mha(model))
    assert type(model.first) is Own
    assert not recwarn.list
