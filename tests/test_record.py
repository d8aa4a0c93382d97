"""record_attention: what it collects is what the layers attended, and the model does not notice."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_attn
from torch_attn import record_attention, reference, replace_mha

BATCH, LENGTH, DIM, HEADS = 3, 6, 16, 4
ROW_STATISTICS = ("entropy", "max_weight", "argmax", "mean_distance", "logsumexp", "window_mass")
STATISTICS = (*ROW_STATISTICS, "top_weights", "top_indices", "column_sum")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Own(nn.Module):
    """A user's layer, which calls the functions instead of the module."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.call(q, k, v).transpose(1, 2).flatten(-2)


def encoder(layers: int = 2, dropout: float = 0.0, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=dropout, batch_first=True, **options)
    return replace_mha(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


def inputs() -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM)


def weights_of(layer: nn.MultiheadAttention, x: Tensor, **options: Any) -> Tensor:
    """The layer's own maps, from its input."""
    return layer(x, x, x, need_weights=True, average_attn_weights=False, **options)[1]


def inputs_of_layers(model: nn.TransformerEncoder, x: Tensor) -> list[Tensor]:
    found = [x]
    for layer in model.layers:
        found.append(layer(found[-1]))
    return found[:-1]


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("training", [True, False])
def test_maps_are_those_of_each_layer(training: bool) -> None:
    model, x = encoder().train(training), inputs()
    with torch.no_grad():
        with record_attention(model) as record:
            model(x)
        assert record.layers == ["layers.0.self_attn", "layers.1.self_attn"]
        for layer, given, name in zip(model.layers, inputs_of_layers(model, x), record.layers, strict=True):
            (actual,) = record.maps[name]
            torch.testing.assert_close(actual, weights_of(layer.self_attn, given))
        assert record.dropped == 0
        assert [x.shape for x in record.last_maps()] == [(BATCH, HEADS, LENGTH, LENGTH)] * 2


OPTIONS: dict[str, dict[str, Any]] = {
    "maps": {},
    "mean": {"heads": "mean", "reduce": "mean"},
    "statistics": {"statistics": STATISTICS, "maps": True},
    "small": {"max_bytes": 1},
}


@pytest.mark.filterwarnings("ignore:record_attention keeps")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_outputs_and_gradients_are_bit_equal(options: dict[str, Any], dropout: float) -> None:
    model, x = encoder(dropout=dropout), inputs()
    torch.manual_seed(5)
    expected = results(model, x)
    torch.manual_seed(5)
    with record_attention(model, **options):
        actual = results(model, x)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_are_bit_equal(dtype: torch.dtype) -> None:
    model, x = encoder(), inputs()
    if dtype == torch.float64:
        model, x = model.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = results(model, x)
        with record_attention(model) as record:
            actual = results(model, x)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    total = record.last_maps()[0].double().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-2)


def test_nested_tensor_path_of_an_encoder_stays_open() -> None:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True)
    model, x = replace_mha(nn.TransformerEncoder(layer, 2)).eval(), inputs()
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        with record_attention(model) as record:
            actual = model(x, src_key_padding_mask=padding)
    assert torch.equal(actual, expected)
    assert not record.last_maps()[0][1, :, :, 4:].any()
    assert record.last_maps()[0][0].any(-1).all()


@pytest.mark.parametrize("call", [torch_attn.attention, torch_attn.scaled_dot_product_attention])
def test_layers_that_call_the_functions_are_recorded(call: Callable[..., Tensor]) -> None:
    model = nn.Sequential(Own(call), Own(lambda q, k, v: call(q, k, v, is_causal=True)))
    x = inputs()
    with record_attention(model) as record:
        model(x)
    assert record.layers == ["0", "1"]
    assert record.maps["0"][0].triu(1).any()
    assert not record.maps["1"][0].triu(1).any()


def test_options_of_the_call_reach_the_maps() -> None:
    mask = torch.randn(HEADS, LENGTH, LENGTH)
    options = {
        "attn_mask": mask,
        "scale": 0.3,
        "window_left": 2,
        "softcap": 1.5,
        "sinks": torch.randn(HEADS),
        "key_lengths": torch.tensor([LENGTH, 4, 5]),
        "causal_alignment": "bottom_right",
    }

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k))
        return torch_attn.attention(q, k[:, ::2], v[:, ::2], enable_gqa=True, **options)

    seen: list[Tensor] = []
    model = Own(call)
    with record_attention(model) as record:
        model(inputs())
    q, k = (x.double() for x in seen)
    exact = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    _, _, expected = reference.attention(q, k[:, ::2], k[:, ::2], **exact)
    torch.testing.assert_close(record.maps[""][0], expected.float())


def test_a_self_attention_module_alone_is_its_own_model() -> None:
    module, x = torch_attn.MultiheadAttention(DIM, HEADS, batch_first=True), inputs()
    with record_attention(module) as record:
        _, expected = module(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(record.maps[""][0], expected)


@pytest.mark.parametrize("layers", ["layers.1.*", 1, ["layers.1.self_attn"], [1]], ids=str)
def test_layers_are_chosen_by_name_pattern_or_place(layers: Any) -> None:
    model = encoder(3)
    with record_attention(model, layers=layers) as record:
        model(inputs())
    assert record.layers == ["layers.1.self_attn"]


def test_heads_and_queries_are_chosen() -> None:
    model, x = encoder(), inputs()
    with torch.no_grad():
        with record_attention(model) as everything, record_attention(model, heads="mean", queries=[5, 0]) as mean:
            with record_attention(model, heads=[2, 0], queries=slice(1, 3), maps=True, statistics=STATISTICS) as some:
                model(x)
        for name in everything.layers:
            full = everything.maps[name][0]
            torch.testing.assert_close(mean.maps[name][0], full.mean(1)[:, [5, 0]])
            torch.testing.assert_close(some.maps[name][0], full[:, [2, 0], 1:3])
            torch.testing.assert_close(some.statistics[name]["column_sum"][0], full.sum(-2)[:, [2, 0]])
            torch.testing.assert_close(some.statistics[name]["max_weight"][0], full.amax(-1)[:, [2, 0], 1:3])


def test_statistics_are_those_of_the_maps() -> None:
    model, x = encoder(), inputs()
    with record_attention(model, statistics=STATISTICS, maps=True, top_k=2, mass_window=1) as record:
        model(x)
    for name in record.layers:
        full = record.maps[name][0]
        found = {key: values[0] for key, values in record.statistics[name].items()}
        assert set(found) == set(STATISTICS)
        distance = (torch.arange(LENGTH).unsqueeze(1) - torch.arange(LENGTH)).abs()
        expected = {
            "entropy": -torch.special.xlogy(full, full).sum(-1),
            "max_weight": full.amax(-1),
            "mean_distance": (full * distance).sum(-1),
            "window_mass": (full * (distance <= 1)).sum(-1),
            "top_weights": full.topk(2).values,
            "column_sum": full.sum(-2),
        }
        # Of two keys whose weights are equal to rounding either may be named.
        chosen = full.gather(-1, found["argmax"].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(chosen, found["max_weight"])
        torch.testing.assert_close(full.gather(-1, found["top_indices"]), found["top_weights"])
        for key, values in expected.items():
            torch.testing.assert_close(found[key], values, msg=lambda m, k=key: f"{k}: {m}")


def test_statistics_alone_keep_no_maps() -> None:
    model = encoder()
    with record_attention(model, statistics=["entropy"]) as record:
        model(inputs())
    assert record.maps == {}
    assert list(record.statistics) == record.layers != []


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_reductions_run_over_batch_and_calls(reduce: str) -> None:
    model, batches = encoder(), [inputs(), inputs()[:1], inputs()]
    with torch.no_grad(), record_attention(model) as everything, record_attention(model, reduce=reduce) as record:
        for x in batches:
            model(x)
    for name, (actual,) in record.maps.items():
        full = torch.cat(everything.maps[name])
        torch.testing.assert_close(actual, full.mean(0) if reduce == "mean" else full.sum(0))


def test_a_function_reduces_each_map_and_frees_the_rest() -> None:
    model = encoder()
    with torch.no_grad(), record_attention(model, reduce=lambda w: w[:, :, 0], max_bytes=2**20) as record:
        model(inputs())
        model(inputs())
    for maps in record.maps.values():
        assert [x.shape for x in maps] == [(BATCH, HEADS, LENGTH)] * 2
        assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in maps)


def test_calls_of_other_shapes_cannot_be_added_up() -> None:
    model = encoder()
    with record_attention(model, reduce="mean"):
        model(inputs())
        with pytest.raises(ValueError, match="layers.0.self_attn was .* and is now"):
            model(inputs()[:, :4])


def test_memory_is_bounded() -> None:
    model = encoder()
    one = BATCH * HEADS * LENGTH * LENGTH * 4
    with record_attention(model, max_bytes=3 * one) as record:
        with pytest.warns(UserWarning, match="max_bytes"):
            for _ in range(4):
                model(inputs())
    assert sum(len(maps) for maps in record.maps.values()) == 3
    assert record.dropped == 5


def test_what_is_recorded_carries_no_graph() -> None:
    model = encoder()
    with record_attention(model, statistics=["entropy"], maps=True) as record:
        model(inputs())
    assert not any(x.requires_grad for x in record.last_maps())
    assert not any(x.requires_grad for s in record.statistics.values() for x in s["entropy"])


def test_an_exception_leaves_nothing_behind() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model, x = encoder(), inputs()
    hooks = torch.nn.modules.module
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    with pytest.raises(RuntimeError, match="broken"), record_attention(nn.Sequential(model, Broken())) as record:
        nn.Sequential(model, Broken())(x)
    assert before == (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks))
    kept = len(record.maps["0.layers.0.self_attn"])
    model(x)
    assert len(record.maps["0.layers.0.self_attn"]) == kept == 1


def test_recording_goes_on_after_an_exception_inside() -> None:
    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("stop")
            return x

    first, second = Own(torch_attn.attention), Own(torch_attn.attention)
    model = nn.Sequential(nn.Sequential(first, Stop()), second)
    with record_attention(model) as record:
        with pytest.raises(RuntimeError, match="stop"):
            model(inputs())
        model.eval()(inputs())
    assert record.layers == ["0.0", "1"]
    assert [len(maps) for maps in record.maps.values()] == [2, 1]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_layer_is_recorded_once(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Own(torch_attn.attention)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    model, x = Checkpointed(), inputs().requires_grad_()
    with record_attention(model) as record:
        model(x).sum().backward()
    assert {name: len(maps) for name, maps in record.maps.items()} == {"inner": 1}


def test_other_models_and_other_threads_are_left_out() -> None:
    model, other = encoder(), encoder()
    with record_attention(model) as record:
        other(inputs())
        thread = threading.Thread(target=model, args=(inputs(),))
        thread.start()
        thread.join()
        assert record.layers == []
        model(inputs())
    assert [len(maps) for maps in record.maps.values()] == [1, 1]


def test_a_shared_layer_is_one_layer_called_twice() -> None:
    layer = Own(torch_attn.attention)
    model = nn.Sequential(layer, layer)
    with record_attention(model) as record:
        model(inputs())
    assert {name: len(maps) for name, maps in record.maps.items()} == {"0": 2}


def test_a_scripted_model_is_recorded_as_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(torch_attn.MultiheadAttention(DIM, HEADS, batch_first=True))
    x = inputs()
    with record_attention(model) as record:
        _, expected = model(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(record.maps[""][0], expected)


def test_a_model_without_our_attention_is_told_so() -> None:
    model = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=True)
    with pytest.warns(UserWarning, match="replace_mha"), record_attention(model):
        model(inputs())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"layers": "decoder.*"}, "layers names 'decoder.*', which matches no module"),
        ({"layers": [-1]}, "layers holds -1"),
        ({"statistics": ["entropi"]}, "statistics names 'entropi', which is none of logsumexp, entropy"),
        ({"statistics": ["argmax"], "reduce": "mean"}, "argmax holds indices"),
        ({"statistics": ["top_indices"], "heads": "mean"}, "top_indices holds indices"),
        ({"reduce": "median"}, "reduce is 'median'"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), record_attention(encoder(), **options):
        pass
