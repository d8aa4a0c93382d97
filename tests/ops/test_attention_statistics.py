"""attention_statistics equals what the float64 map says, for every option, and is differentiable in O(L) memory."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_attn
from torch_attn import reference

from ..cases import CASE_BY_NAME, Case, small
from ..map_oracle import (
    ASKED,
    DTYPES,
    MAP_CASES,
    STATISTICS,
    Results,
    accumulator_of,
    assert_keys_hold_the_largest_weights,
    assert_within_precision,
    draw,
    dtype_name,
    exact_statistics,
    in_float64,
    leaves_of,
    statistics_cotangents,
    with_gradients,
)
from .test_fused_derivatives import LargestResult

ops = torch.ops.torch_attn


def ours(query: Tensor, key: Tensor, **options: Any) -> Results:
    statistics = torch_attn.attention_statistics(query, key, **options, **ASKED, enable_gqa=True)
    return {n: x for n, x in statistics._asdict().items() if x is not None}


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_equals_the_float64_map(case: Case, isa: str, poisoned_memory: None) -> None:
    query, key, options = draw(case, torch.float32)
    actual = ours(query, key, **options)
    assert_within_precision(actual, exact_statistics, torch.float32, query, key, options, {})
    if case.name != "extreme_mask_rows":  # where float32 rounds all scores to one
        assert_keys_hold_the_largest_weights(actual, reference.attention_weights(*in_float64(query, key), **options))


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_results_and_gradients_equal_float64_autograd(case: Case, poisoned_memory: None) -> None:
    query, key, options = draw(case, torch.float64)
    names = tuple(n for n in STATISTICS if n != "logsumexp" or case.name != "extreme_mask_rows")
    cotangents = statistics_cotangents(query, key, names)  # torch's derivative of a logsumexp of −1e9 is wrong
    actual = with_gradients(ours, query, key, options, cotangents)
    assert_within_precision(actual, exact_statistics, torch.float64, query, key, options, cotangents)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["causal_long", "grouped_query", "float_mask_over_heads", "everything"])
def test_every_dtype_on_every_instruction_set(name: str, dtype: torch.dtype, isa: str, poisoned_memory: None) -> None:
    query, key, options = draw(CASE_BY_NAME[name], dtype)
    unstable = () if dtype == torch.float64 else ("max_weight", "top_weights")  # two keys may change places at the top
    cotangents = statistics_cotangents(query, key, tuple(n for n in STATISTICS if n not in unstable))
    actual = with_gradients(ours, query, key, options, cotangents)
    assert actual["entropy"].dtype == actual["top_weights"].dtype == accumulator_of(dtype)
    assert_within_precision(actual, exact_statistics, dtype, query, key, options, cotangents)
    assert_keys_hold_the_largest_weights(actual, reference.attention_weights(*in_float64(query, key), **options))


@pytest.mark.parametrize("name", STATISTICS)
def test_each_gradient_alone_equals_float64_autograd(name: str, isa: str) -> None:
    query, key, options = draw(CASE_BY_NAME["everything"], torch.float64)
    cotangents = statistics_cotangents(query, key, (name,))
    actual = with_gradients(ours, query, key, options, cotangents)
    assert "grad_query" in actual
    assert_within_precision(actual, exact_statistics, torch.float64, query, key, options, cotangents)


@pytest.mark.parametrize("name", ["extreme_mask_rows", "sinks"])
def test_entropy_gradient_survives_a_large_logsumexp(name: str, isa: str) -> None:
    """Rows whose every key carries −1e9 have uniform weights in float32: entropy log S, gradient about 0."""
    query, key, options = draw(CASE_BY_NAME[name], torch.float32)
    mask = torch.full((1, 1, query.size(2), 1), -1e9)
    options["attn_mask"] = mask
    options.pop("sinks", None)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    found = ours(*leaves, **options)
    torch.testing.assert_close(found["entropy"], torch.full_like(found["entropy"], math.log(key.size(2))))
    gradients = torch.autograd.grad(found["entropy"].sum(), leaves)
    assert all(g.isfinite().all() and g.abs().max() < 1e-4 for g in gradients)


def test_what_is_not_asked_for_is_none() -> None:
    query = torch.randn(2, 3, 5, 4)
    found = torch_attn.attention_statistics(query, query, column_sum=False)
    assert isinstance(found, torch_attn.AttentionStatistics)
    assert found.window_mass is found.top_weights is found.top_indices is found.column_sum is None


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (0, 0, 0, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, ...], isa: str, poisoned_memory: None) -> None:
    batch, heads, query_length, key_length = sizes
    query = torch.randn(batch, heads, query_length, 4, requires_grad=True)
    key = torch.randn(batch, heads, key_length, 4, requires_grad=True)
    found = ours(query, key)
    assert (found["logsumexp"] == -math.inf).all()
    assert (found["argmax"] == -1).all() and (found["top_indices"] == -1).all()
    for name in STATISTICS[1:]:
        assert (found[name] == 0).all(), name
    assert found["column_sum"].shape == (batch, heads, key_length)
    sum(found[n].sum() for n in STATISTICS[1:]).backward()
    assert (query.grad == 0).all() and (key.grad == 0).all()


def test_a_row_with_no_key_has_zeros(isa: str, poisoned_memory: None) -> None:
    query, key = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 7))
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2] = False
    found = ours(query, key, attn_mask=mask)
    for name in ("entropy", "max_weight", "mean_distance", "window_mass", "top_weights"):
        assert (found[name][:, :, 2] == 0).all() and found[name].isfinite().all(), name
    assert (found["argmax"][:, :, 2] == -1).all() and (found["top_indices"][:, :, 2] == -1).all()
    torch.testing.assert_close(found["column_sum"].sum(-1), torch.full((1, 2), 5.0, dtype=torch.float64))
    sum(found[n].square().sum() for n in STATISTICS[1:]).backward()
    assert query.grad is not None and (query.grad[:, :, 2] == 0).all() and query.grad.isfinite().all()
    assert key.grad is not None and key.grad.isfinite().all()


def test_a_sink_takes_mass_from_the_keys(isa: str) -> None:
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    found = ours(query, key, sinks=torch.tensor([math.log(2.0)]))  # weights 1/5 each, the sink 2/5
    torch.testing.assert_close(found["entropy"].item(), 0.6 * math.log(5.0))
    torch.testing.assert_close(found["mean_distance"].item(), 0.2 * (0 + 1 + 2))
    torch.testing.assert_close(found["column_sum"], torch.full((1, 1, 3), 0.2))


def test_equal_scores_are_ranked_by_their_keys_number(isa: str) -> None:
    query, key = torch.ones(1, 1, 70, 3), torch.zeros(1, 1, 300, 3)
    key[:, :, [7, 130, 201, 202]] = 1.0
    found = torch_attn.attention_statistics(query, key, top_k=6)
    assert found.top_indices is not None
    assert (found.argmax == 7).all()
    assert (found.top_indices == torch.tensor([7, 130, 201, 202, 0, 1])).all()


@pytest.mark.parametrize("top_k", [1, 17, 64, 400])
def test_top_k_is_torchs(top_k: int, isa: str) -> None:
    query, key = torch.randn(2, 3, 70, 8, dtype=torch.float64), torch.randn(2, 3, 310, 8, dtype=torch.float64)
    found = torch_attn.attention_statistics(query, key, top_k=top_k, column_sum=False)
    assert found.top_weights is not None and found.top_indices is not None
    count = min(top_k, 310)
    weights = reference.attention_weights(query, key)
    values, indices = weights.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found.top_weights[..., :count], values[..., :count])
    assert torch.equal(found.top_indices[..., :count], indices[..., :count])
    assert (found.top_indices[..., count:] == -1).all() and (found.top_weights[..., count:] == 0).all()


def test_entropy_keeps_its_digits_beside_large_scores(isa: str) -> None:
    """Scores around 10⁴ with differences of a few: their entropy must not drown in logsumexp's rounding."""
    key = torch.randn(1, 1, 50, 2).round()
    key[..., 0] = 1.0
    query = torch.tensor([8192.0, 1.0]).expand(1, 1, 20, 2).contiguous()
    found = torch_attn.attention_statistics(query, key, scale=1.0)
    wanted = reference.attention_statistics(query.double(), key.double(), scale=1.0)["entropy"]
    assert wanted is not None
    torch.testing.assert_close(found.entropy.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_any_strides_are_accepted(dtype: torch.dtype, isa: str) -> None:
    query = torch.randn(2, 2, 18, 12).to(dtype)[:, :, ::2, ::2]
    key = torch.randn(2, 2, 6, 11).to(dtype).transpose(-2, -1)
    assert_within_precision(ours(query, key), exact_statistics, dtype, query, key, {}, {})


SHAPES = [((5, 4), (7, 4)), ((2, 5, 4), (2, 7, 4)), ((1, 3, 5, 4), (2, 3, 7, 4)), ((2, 2, 3, 5, 4), (2, 1, 3, 7, 4))]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_leading_dimensions_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    query, key = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    found = torch_attn.attention_statistics(query, key, **ASKED)
    weights = torch.softmax(query @ key.mT / 2, -1)
    assert found.top_weights is not None and found.column_sum is not None
    torch.testing.assert_close(found.column_sum, weights.sum(-2))
    torch.testing.assert_close(found.entropy, -(weights * weights.log()).sum(-1))
    torch.testing.assert_close(found.top_weights, weights.topk(3, -1).values)
    loss, wanted = found.entropy.square().sum(), (weights * weights.log()).sum(-1).square().sum()
    for a, b in zip(torch.autograd.grad(loss, (query, key)), torch.autograd.grad(wanted, (query, key)), strict=True):
        torch.testing.assert_close(a, b)


def test_neither_threads_nor_repetition_change_a_bit(isa: str) -> None:
    query, key = torch.randn(1, 2, 411, 16), torch.randn(1, 2, 411, 16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(ours(query, key, is_causal=True))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[n], x) for n, x in found[0].items())


def test_neither_forward_nor_backward_holds_the_map() -> None:
    length = 160
    query, key = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(2))
    with LargestResult() as results:
        found = ours(query, key, is_causal=True)
        sum(found[n].sum() for n in STATISTICS).backward()
    assert 0 < results.elements < length * length


NAMES = ["plain", "causal_more_keys", "window", "grouped_query", "bool_mask_empty_rows", "float_mask_over_heads"]
NAMES += ["key_lengths", "alibi_bottom_right", "softcap", "sinks", "everything"]


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_first_and_second_derivatives(name: str) -> None:
    query, key, options = draw(small(CASE_BY_NAME[name]), torch.float64)
    leaves = leaves_of(query, key, options)

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        given = options | dict(zip(leaves, args, strict=True))
        found = ours(given.pop("query"), given.pop("key"), **given)
        return tuple(found[n].masked_fill(~found[n].isfinite(), 0.0) for n in STATISTICS)

    inputs = tuple(x.detach().clone().requires_grad_() for x in leaves.values())
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "grouped_query", "causal", "float_mask_over_heads", "key_lengths", "sinks"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name: str, requires_grad: bool) -> None:
    query, key, options = draw(small(CASE_BY_NAME[name]), torch.float32)
    inputs = (query.requires_grad_(requires_grad), key.requires_grad_(requires_grad))
    torch.library.opcheck(ops.attention_statistics_forward.default, inputs, options | ASKED)
    torch.library.opcheck(ops.attention_statistics.default, inputs, options | ASKED | {"enable_gqa": True})
    torch.library.opcheck(ops.attention_statistics.default, inputs, options | {"column_sum": False, "enable_gqa": True})


@pytest.mark.parametrize("name", ["plain", "float_mask_over_heads", "alibi", "sinks"])
def test_opcheck_backward(name: str) -> None:
    query, key, options = draw(small(CASE_BY_NAME[name]), torch.float32)
    s = torch_attn.AttentionStatistics(*ops.attention_statistics_forward(query, key, **options, **ASKED))
    gradients = [torch.randn_like(getattr(s, n)) for n in STATISTICS]
    saved = (s.logsumexp, s.entropy, s.max_weight, s.argmax, s.mean_distance, s.window_mass, s.top_weights)
    wanted = [True, True, "attn_mask" in options, "alibi_slopes" in options, "sinks" in options]
    args = (*gradients, query, key, *saved, s.top_indices)
    torch.library.opcheck(
        ops.attention_statistics_backward.default, args, options | {"mass_window": 5, "output_mask": wanted}
    )


def look(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch_attn.attention_statistics(query, key, attn_mask=mask, is_causal=True, top_k=2)
    return found.entropy, found.argmax, found.column_sum


def test_torchscript_compiles_a_call_to_the_operator() -> None:
    scripted = torch.jit.script(look)
    assert "torch_attn::attention_statistics(" in str(scripted.graph)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    inputs = (torch.randn(1, 2, 5, 4), torch.randn(1, 2, 7, 4), torch.randn(5, 7))
    for a, b in zip(loaded(*inputs), look(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_has_no_graph_break_and_stays_dynamic() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(look, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 12, 33):
        inputs = (torch.randn(1, 2, length, 4, requires_grad=True), torch.randn(1, 2, length, 4), torch.randn(length))
        found, wanted = compiled(*inputs), look(*inputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
        (a,), (b,) = (torch.autograd.grad(x[0].sum() + x[2].square().sum(), inputs[:1]) for x in (found, wanted))
        torch.testing.assert_close(a, b)


def test_autocast_casts_inputs_and_keeps_statistics_in_float32() -> None:
    query = torch.randn(1, 2, 9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch_attn.attention_statistics(query, query)
    assert found.entropy.dtype == torch.float32
    wanted = torch_attn.attention_statistics(query.bfloat16(), query.bfloat16())
    torch.testing.assert_close(found.entropy, wanted.entropy)
    found.entropy.sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


def test_vmap_maps_queries_and_keys() -> None:
    query, key = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64), torch.randn(2, 2, 7, 4, dtype=torch.float64)
    found = torch.func.vmap(lambda q: ours(q, key), 0)(query)
    wanted = ours(query, key.expand(3, -1, -1, -1, -1))
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x)


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
BAD_CALLS: list[tuple[str, tuple[Tensor, Tensor], dict[str, Any], str]] = [
    ("top_k", (Q, K), {"top_k": -1}, "top_k.*-1"),
    ("mass_window", (Q, K), {"mass_window": -2}, "mass_window.*-2"),
    ("key_head_dim", (Q, K[..., :6]), {}, "head_dim"),
    ("mask_shape", (Q, K), {"attn_mask": torch.randn(3, 7)}, "attn_mask.*3, 7"),
    ("heads", (Q, K[:, :2]), {}, "enable_gqa"),
    ("integers", (Q.long(), K.long()), {}, "query.*int64"),
]


@pytest.mark.parametrize(("args", "options", "message"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_the_error_names_the_argument(args: tuple[Tensor, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"(?s){message}"):
        torch_attn.attention_statistics(*args, **options)


def test_a_backward_without_its_statistic_is_refused() -> None:
    found = ops.attention_statistics_forward(Q, Q)
    with pytest.raises(RuntimeError, match="grad_entropy is given, but entropy is None"):
        ops.attention_statistics_backward(
            *(None, found[1], None, None, None, None, None, Q, Q, found[0]),
            *([None] * 7),
            output_mask=[True, True, False, False, False],
        )
