"""torch_attn.MultiheadAttention against nn.MultiheadAttention with the same weights: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import torch_attn

from .cases import (
    BATCH,
    CASES,
    EMBED_DIM,
    HEADS,
    KEY_LENGTH,
    QUERY_LENGTH,
    Case,
    detached,
    ours,
    results,
)

GRAD_MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_pytorch(case: Case) -> None:
    theirs = case.build()
    arguments = case.inputs()
    expected = results(theirs, arguments)
    actual = results(ours(theirs), detached(arguments))
    assert actual.keys() == expected.keys()
    for name, value in actual.items():  # torch.testing.assert_close would take most of this test's time
        assert value.shape == expected[name].shape and value.dtype == expected[name].dtype, name
        assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-11), (name, value - expected[name])


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_float32_is_as_accurate_as_pytorch(case: Case) -> None:
    exact_module = case.build()
    exact_arguments = case.inputs()
    exact = results(exact_module, exact_arguments)
    theirs = case.build(torch.float32)
    theirs.load_state_dict(exact_module.state_dict())
    reference = results(theirs, detached(exact_arguments, torch.float32))
    actual = results(ours(theirs), detached(exact_arguments, torch.float32))
    for name, value in actual.items():
        # A gradient may cancel to 0 from terms of about 1, and PyTorch's own error is a matter of luck in calls this
        # small. tests/ops measures the kernels closely; here a lost digit would show.
        scale = max(exact[name].abs().max().item(), 1.0)
        bound = 3 * (reference[name] - exact[name]).abs().max().item() + 64 * torch.finfo(torch.float32).eps * scale
        assert (value - exact[name]).abs().max().item() <= bound, name


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_every_grad_mode_calls_the_kernel(mode: str, training: bool, weights: str) -> None:
    case = Case(weights=weights)
    theirs = case.build().train(training)
    mine, arguments = ours(theirs), case.inputs()
    before = torch.ops.torch_attn.kernel_calls()
    with GRAD_MODES[mode]():
        actual, expected = mine(**arguments), theirs(**arguments)
    assert torch.ops.torch_attn.kernel_calls() == before + 1
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("weights", ["averaged", "per_head", "no_weights"])
@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
def test_fully_masked_rows_give_zeros_and_finite_gradients(kind: str, weights: str) -> None:
    """PyTorch returns NaN with weights, and zeros without."""
    case = Case(weights=weights)
    module, arguments = ours(case.build()), case.inputs()
    if kind == "padding":
        rows = (slice(0, 1), slice(None))
        arguments["key_padding_mask"] = torch.zeros(BATCH, QUERY_LENGTH, dtype=torch.bool)
        arguments["key_padding_mask"][0] = True
    else:
        rows = (slice(None), slice(2, 3))
        mask = torch.zeros(QUERY_LENGTH, QUERY_LENGTH, dtype=torch.bool)
        mask[2] = True
        floats = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -math.inf).requires_grad_()
        arguments["attn_mask"] = mask if kind == "bool" else floats
    named = results(module, arguments)
    assert all(x.isfinite().all() for x in named.values())
    torch.testing.assert_close(named["out"][rows], module.out_proj.bias.detach().expand_as(named["out"][rows]))
    if weights == "averaged":
        assert not named["weights"][rows].any()


@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_rows_under_one_large_bias_are_uniform(weights: str) -> None:
    """transformers writes finfo.min into padded rows: such a row is not empty."""
    case = Case("plain", "self", "float", weights=weights)
    theirs, arguments = case.build(torch.float32), case.inputs(torch.float32)
    with torch.no_grad():
        arguments["attn_mask"].zero_()
        arguments["attn_mask"][1] = torch.finfo(torch.float32).min
        arguments["attn_mask"][2] = -1e9
    expected, actual = results(theirs, arguments), results(ours(theirs), detached(arguments))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("name", ["bias_kv", "zero_attn", "bias_kv_zero_attn"])
def test_appended_keys_stay_visible_under_is_causal(name: str, padding: str) -> None:
    """PyTorch without weights hides them from all rows but the last; with weights, it shows them to all."""
    case = Case(name, "self", "causal", padding, "no_weights")
    theirs, arguments = case.build(), case.inputs()
    actual, _ = ours(theirs)(**arguments)
    expected, _ = theirs(**{**arguments, "need_weights": True})
    torch.testing.assert_close(actual, expected)


def test_causal_hint_without_weights_does_not_read_the_mask() -> None:
    """As in PyTorch: row i attends keys 0 to i whatever the mask says, also where L is not S."""
    case = Case("plain", "cross", "bool", weights="no_weights")
    theirs, arguments = case.build(), case.inputs() | {"is_causal": True}
    torch.testing.assert_close(ours(theirs)(**arguments), theirs(**arguments))


def test_causal_hint_with_padding_is_trusted() -> None:
    case = Case("plain", "self", "causal", "bool", "no_weights")
    theirs, arguments = case.build(), case.inputs()
    expected, _ = theirs(**arguments)
    arguments["attn_mask"] = torch.zeros_like(arguments["attn_mask"])
    torch.testing.assert_close(ours(theirs)(**arguments)[0], expected)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64])
def test_float_masks_need_not_have_the_dtype_of_the_query(mask_dtype: torch.dtype) -> None:
    case = Case(attn_mask="float", key_padding_mask="float", weights="no_weights")
    theirs, arguments = case.build(), case.inputs()
    expected, _ = theirs(**arguments)
    arguments["attn_mask"] = arguments["attn_mask"].detach().to(mask_dtype)
    torch.testing.assert_close(ours(theirs)(**arguments)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "batch_first"])
@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_output_is_contiguous(name: str, weights: str) -> None:
    case = Case(name, weights=weights)
    assert ours(case.build())(**case.inputs())[0].is_contiguous()


@pytest.mark.parametrize("empty", ["batch", "query"])
def test_empty_inputs_are_taken(empty: str) -> None:
    module = torch_attn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    batch, length = (0, QUERY_LENGTH) if empty == "batch" else (BATCH, 0)
    out, weights = module(torch.randn(batch, length, EMBED_DIM), *[torch.randn(batch, KEY_LENGTH, EMBED_DIM)] * 2)
    assert out.shape == (batch, length, EMBED_DIM)
    assert weights.shape == (batch, length, KEY_LENGTH)


@pytest.mark.parametrize("weights", ["averaged", "no_weights"])
def test_shapes_are_inferred_on_the_meta_device(weights: str) -> None:
    case = Case(key_padding_mask="bool", weights=weights)
    arguments = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in case.inputs().items()}
    expected, actual = case.build()(**case.inputs()), ours(case.build()).to("meta")(**arguments)
    assert [None if x is None else x.shape for x in actual] == [None if x is None else x.shape for x in expected]


@pytest.mark.parametrize("case", [Case(), Case("bias_kv", weights="no_weights")], ids=str)
def test_autocast_gives_the_dtypes_of_pytorch_and_close_values(case: Case) -> None:
    theirs, arguments = case.build(torch.float32), case.inputs(torch.float32)
    mine = ours(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = theirs(**arguments), mine(**arguments)
    exact = theirs(**arguments)
    for value, reference, truth in zip(actual, expected, exact, strict=True):
        if value is None:
            continue
        assert value.dtype == reference.dtype
        bound = 2 * (reference.float() - truth).abs().max() + 0.01 * truth.abs().max()
        assert (value.float() - truth).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(), Case("plain", "cross", "bool", weights="no_weights")], ids=str)
def test_half_precision_is_as_accurate_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    theirs, arguments = case.build(dtype), case.inputs(dtype)
    exact_module = case.build()
    exact_module.load_state_dict(theirs.state_dict())
    exact = results(exact_module, detached(arguments, torch.float64))
    expected, actual = results(theirs, arguments), results(ours(theirs), detached(arguments))
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        scale = max(exact[name].abs().max().item(), 1.0)
        bound = 3 * (expected[name] - exact[name]).abs().max().item() + 4 * torch.finfo(dtype).eps * scale
        assert (value - exact[name]).abs().max().item() <= bound, name
