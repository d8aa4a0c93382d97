"""attention_weights is the float64 map, or the asked part of it, for every option, with every derivative."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_attn
from torch_attn import reference

from ..cases import CASE_BY_NAME, Case, small
from ..map_oracle import (
    DTYPES,
    MAP_CASES,
    Results,
    assert_within_precision,
    draw,
    dtype_name,
    exact_weights,
    leaves_of,
    weights_cotangent,
    with_gradients,
)
from .test_fused_derivatives import LargestResult

ops = torch.ops.torch_attn
PARTS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "all": lambda c: {},
    "mean": lambda c: {"heads": "mean"},
    "some_heads": lambda c: {"heads": [c.heads - 1, 0]},
    "one_head_of_every_second_row": lambda c: {"heads": [0], "queries": slice(1, None, 2)},
    "mean_of_rows_in_any_order": lambda c: {"heads": "mean", "queries": rows_in_any_order(c)},
}


def rows_in_any_order(case: Case) -> Tensor:
    """With rows that come twice and rows counted from the end."""
    length = case.query_length
    return torch.randint(-length, length, (min(2 * length, 77),))


def ours(part: dict[str, Any]) -> Callable[..., Results]:
    def function(query: Tensor, key: Tensor, **options: Any) -> Results:
        return {"weights": torch_attn.attention_weights(query, key, **options, **part, enable_gqa=True)}

    return function


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_equals_the_float64_map(case: Case, isa: str, poisoned_memory: None) -> None:
    query, key, options = draw(case, torch.float32)
    for part in ({}, {"heads": "mean"}):
        actual = ours(part)(query, key, **options)
        assert_within_precision(actual, exact_weights(part), torch.float32, query, key, options, {})


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_any_part_and_its_gradients_equal_float64_autograd(case: Case, part: str, poisoned_memory: None) -> None:
    query, key, options = draw(case, torch.float64)
    chosen = PARTS[part](case)
    given = weights_cotangent(query, key, chosen)
    actual = with_gradients(ours(chosen), query, key, options, given)
    assert_within_precision(actual, exact_weights(chosen), torch.float64, query, key, options, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["causal_long", "grouped_query", "float_mask_over_heads", "everything"])
def test_every_dtype_on_every_instruction_set(name: str, dtype: torch.dtype, isa: str, poisoned_memory: None) -> None:
    query, key, options = draw(CASE_BY_NAME[name], dtype)
    for part in ({}, {"heads": "mean"}):
        given = weights_cotangent(query, key, part)
        actual = with_gradients(ours(part), query, key, options, given)
        assert all(x.dtype == (options.get(n.removeprefix("grad_"), query)).dtype for n, x in actual.items())
        assert_within_precision(actual, exact_weights(part), dtype, query, key, options, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_a_known_logsumexp_changes_nothing(name: str, dtype: torch.dtype, isa: str) -> None:
    case = CASE_BY_NAME[name]
    query, key, options = draw(case, dtype)
    _, logsumexp = torch_attn.attention(query, key, key, **options, enable_gqa=True, return_logsumexp=True)
    for part in PARTS.values():
        chosen = part(case)
        without = ours(chosen)(query, key, **options)["weights"]
        actual = ours(chosen)(query, key, **options, logsumexp=logsumexp)["weights"]
        torch.testing.assert_close(actual, without, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_weights_are_what_the_kernel_multiplies_value_by(isa: str) -> None:
    query, key, options = draw(CASE_BY_NAME["everything"], torch.float64)
    value = torch.randn(2, 2, key.size(2), 5, dtype=torch.float64)
    weights = torch_attn.attention_weights(query, key, **options, enable_gqa=True)
    out = torch_attn.attention(query, key, value, **options, enable_gqa=True)
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), out)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 0, 0, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, ...], isa: str, poisoned_memory: None) -> None:
    batch, heads, query_length, key_length = sizes
    query = torch.randn(batch, heads, query_length, 4, requires_grad=True)
    key = torch.randn(batch, heads, key_length, 4, requires_grad=True)
    weights = torch_attn.attention_weights(query, key)
    assert weights.shape == sizes
    mean = torch_attn.attention_weights(query, key, heads="mean")
    assert mean.shape == (batch, query_length, key_length)
    (weights.sum() + mean.sum()).backward()
    assert (query.grad == 0).all() and (key.grad == 0).all()


@pytest.mark.parametrize("part", [{}, {"heads": []}, {"queries": []}, {"queries": slice(3, 3)}], ids=str)
def test_choosing_nothing_gives_nothing(part: dict[str, Any]) -> None:
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    wanted = reference.attention_weights(query, key, **part)
    torch.testing.assert_close(torch_attn.attention_weights(query, key, **part), wanted)


def test_a_row_with_no_key_is_zero(isa: str, poisoned_memory: None) -> None:
    query, key = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 7))
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2] = False
    weights = torch_attn.attention_weights(query, key, attn_mask=mask)
    assert (weights[:, :, 2] == 0).all()
    torch.testing.assert_close(weights.sum(-1)[:, :, 3:], torch.ones(1, 2, 3, dtype=torch.float64))
    weights.square().sum().backward()
    assert query.grad is not None and (query.grad[:, :, 2] == 0).all() and query.grad.isfinite().all()


def test_rows_of_a_huge_negative_bias_still_sum_to_one(isa: str) -> None:
    query, key = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 1000, 4)
    mask = torch.zeros(9, 1)
    mask[3] = -1e9
    for heads in ("all", "mean"):
        weights = torch_attn.attention_weights(query, key, attn_mask=mask, heads=heads)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_any_strides_are_accepted(dtype: torch.dtype, isa: str) -> None:
    query = torch.randn(2, 2, 18, 12).to(dtype)[:, :, ::2, ::2]
    key = torch.randn(2, 2, 6, 11).to(dtype).transpose(-2, -1)
    given = {"weights": torch.randn(2, 2, 11, 9).to(dtype).mT}
    actual = with_gradients(ours({}), query, key, {}, given)
    assert_within_precision(actual, exact_weights({}), dtype, query, key, {}, given)


SHAPES = [((5, 4), (7, 4)), ((2, 5, 4), (2, 7, 4)), ((1, 3, 5, 4), (2, 3, 7, 4)), ((2, 2, 3, 5, 4), (2, 1, 3, 7, 4))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("with_logsumexp", [False, True])
def test_leading_dimensions_broadcast(shapes: tuple[tuple[int, ...], ...], with_logsumexp: bool) -> None:
    query, key = (torch.randn(s, dtype=torch.float64) for s in shapes)
    scores = query @ key.mT / 2
    options = {"logsumexp": scores.logsumexp(-1)} if with_logsumexp else {}
    torch.testing.assert_close(torch_attn.attention_weights(query, key, **options), scores.softmax(-1))
    mean = torch_attn.attention_weights(query, key, **options, heads="mean")
    torch.testing.assert_close(mean, scores.softmax(-1).mean(-3) if scores.dim() > 2 else scores.softmax(-1))


def test_neither_threads_nor_repetition_change_a_bit(isa: str) -> None:
    query, key = torch.randn(1, 3, 411, 16), torch.randn(1, 3, 411, 16)
    before = torch.get_num_threads()
    for part in ({}, {"heads": "mean"}):
        found = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(torch_attn.attention_weights(query, key, is_causal=True, **part))
        assert all(torch.equal(x, found[0]) for x in found[1:])
    torch.set_num_threads(before)


def test_the_mean_holds_no_more_than_itself_forward_and_backward() -> None:
    heads, length = 8, 64
    query, key = (torch.randn(1, heads, length, 4, requires_grad=True) for _ in range(2))
    with LargestResult() as results:
        torch_attn.attention_weights(query, key, heads="mean").square().sum().backward()
    assert results.elements == length * length


NAMES = ["plain", "causal_more_keys", "window", "grouped_query", "bool_mask_empty_rows", "float_mask_over_heads"]
NAMES += ["key_lengths", "alibi_bottom_right", "softcap", "sinks", "everything"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [{}, {"heads": "mean"}, {"queries": [2, 0, 2]}], ids=str)
def test_gradcheck_of_first_and_second_derivatives(name: str, part: dict[str, Any]) -> None:
    query, key, options = draw(small(CASE_BY_NAME[name]), torch.float64)
    leaves = leaves_of(query, key, options)

    def function(*args: Tensor) -> Tensor:
        given = options | dict(zip(leaves, args, strict=True))
        return ours(part)(given.pop("query"), given.pop("key"), **given)["weights"]

    inputs = tuple(x.detach().clone().requires_grad_() for x in leaves.values())
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "grouped_query", "causal", "float_mask_over_heads", "key_lengths", "sinks"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    query, key, options = draw(small(CASE_BY_NAME[name]), torch.float32)
    inputs = (query.requires_grad_(requires_grad), key.requires_grad_(requires_grad))
    rows = {"query_rows": torch.arange(3), "query_length": 3}
    torch.library.opcheck(ops.attention_weights_forward.default, inputs, options)
    torch.library.opcheck(ops.attention_weights_forward.default, inputs, options | rows | {"mean": True})
    torch.library.opcheck(ops.attention_weights.default, inputs, options | {"heads": "mean", "enable_gqa": True})
    chosen = {"heads": [1, 0], "queries": torch.tensor([2, -1, 0]), "enable_gqa": True}
    torch.library.opcheck(ops.attention_weights.heads, inputs, options | chosen)


@pytest.mark.parametrize("name", ["plain", "float_mask_over_heads", "alibi", "sinks"])
@pytest.mark.parametrize("mean", [False, True])
def test_opcheck_backward(name: str, mean: bool) -> None:
    query, key, options = draw(small(CASE_BY_NAME[name]), torch.float32)
    weights, logsumexp = ops.attention_weights_forward(query, key, **options, mean=mean)
    wanted = [True, True, "attn_mask" in options, "alibi_slopes" in options, "sinks" in options]
    args = (torch.randn_like(weights), query, key, logsumexp)
    torch.library.opcheck(ops.attention_weights_backward.default, args, options | {"mean": mean, "output_mask": wanted})


def look(query: Tensor, key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch_attn.attention_weights(query, key, is_causal=True, heads="mean", queries=rows)
    return mean, torch_attn.attention_weights(query, key, heads=[1])


def test_torchscript_compiles_a_call_to_the_operator() -> None:
    scripted = torch.jit.script(look)
    assert "torch_attn::attention_weights(" in str(scripted.graph)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    inputs = (torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.tensor([4, 0]))
    for a, b in zip(loaded(*inputs), look(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_has_no_graph_break_and_stays_dynamic() -> None:
    torch._dynamo.reset()

    def function(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        rows = torch_attn.attention_weights(query, key, is_causal=True, queries=slice(1, 4))
        listed = torch_attn.attention_weights(query, key, queries=[3, 0], heads=[1])
        return rows, listed, torch_attn.attention_weights(query, key, heads="mean")

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (7, 12, 33):
            inputs = (torch.randn(1, 2, length, 4, requires_grad=True), torch.randn(1, 2, length, 4))
            found, wanted = compiled(*inputs), function(*inputs)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b)
            losses = [sum(x.square().sum() for x in results) for results in (found, wanted)]
            (a,), (b,) = (torch.autograd.grad(loss, inputs[:1]) for loss in losses)
            torch.testing.assert_close(a, b)


def test_autocast_gives_weights_in_its_dtype() -> None:
    query = torch.randn(1, 2, 9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = torch_attn.attention_weights(query, query)
    assert weights.dtype == torch.bfloat16
    weights.float().square().sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


def test_vmap_maps_queries_masks_and_gradients() -> None:
    query, key = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64), torch.randn(2, 2, 7, 4, dtype=torch.float64)
    mask = torch.randn(3, 5, 7, dtype=torch.float64)

    def loss(q: Tensor, m: Tensor) -> Tensor:
        return torch_attn.attention_weights(q, key, attn_mask=m, heads="mean", queries=[4, 1]).square().sum()

    def plain(q: Tensor, m: Tensor) -> Tensor:
        return (q @ key.mT / 2 + m).softmax(-1).mean(1)[:, [4, 1]].square().sum()

    torch.testing.assert_close(torch.func.vmap(loss)(query, mask), torch.func.vmap(plain)(query, mask))
    found, wanted = (torch.func.vmap(torch.func.grad(f, (0, 1)))(query, mask) for f in (loss, plain))
    torch.testing.assert_close(found, wanted)


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
BAD_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("heads_name", {"heads": "some"}, 'heads.*"some"'),
    ("head_index", {"heads": [0, 4]}, r"heads.*0 to 3.*heads\[1\] is 4"),
    ("negative_head", {"heads": [-1]}, r"heads.*0 to 3.*heads\[0\] is -1"),
    ("row_index", {"queries": [1, 5]}, "queries.*-5 to 4.*5"),
    ("row_tensor", {"queries": torch.tensor([7])}, "range|queries"),
    ("float_rows", {"queries": torch.tensor([1.0])}, "queries.*integers.*float"),
    ("two_dimensional_rows", {"queries": torch.tensor([[1]])}, r"queries.*one-dimensional.*\(1, 1\)"),
    ("backwards_slice", {"queries": slice(None, None, -1)}, "queries.*positive step.*-1"),
    ("logsumexp_shape", {"logsumexp": torch.randn(2, 4, 7)}, r"logsumexp.*\(2, 4, 5\).*\(2, 4, 7\)"),
    ("logsumexp_dtype", {"logsumexp": torch.randn(2, 4, 5).double()}, "logsumexp.*float32.*float64"),
    ("mask_shape", {"attn_mask": torch.randn(3, 7)}, "attn_mask.*3, 7"),
    ("softcap", {"softcap": -1.0}, "softcap.*-1"),
]


@pytest.mark.parametrize(("options", "message"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_the_error_names_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError), match=f"(?s){message}"):
        torch_attn.attention_weights(Q, K, **options)


def test_rows_outside_the_query_are_refused_by_the_raw_operator() -> None:
    with pytest.raises(IndexError, match=r"query_rows.*query_length - 1 = 4.*query_rows\[2\] is 9"):
        ops.attention_weights_forward(Q[:, :, :3], K, query_rows=torch.tensor([0, 1, 9]), query_length=5)
