"""hard_attention: what each estimator returns and differentiates, and the routes into compiled and saved programs."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import torch_attn
from torch_attn import reference

from .test_fused_derivatives import LargestResult

ops = torch.ops.torch_attn
ESTIMATORS = ["reinforce", "straight_through", "argmax", "top_k"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_softcap": {"is_causal": True, "softcap": 3.0, "scale": 0.7},
    "mask_alibi_sinks": {
        "attn_mask": torch.randn(1, 4, 9, 41, dtype=torch.float64),
        "alibi_slopes": torch.rand(4, dtype=torch.float64),
        "sinks": torch.randn(4, dtype=torch.float64),
    },
    "key_lengths": {"key_lengths": torch.tensor([0, 30])},
}
TEMPERATURE = 0.6


def qkv(*, kv_heads: int = 2, rows: int = 9, keys: int = 41, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(2, 4, rows, 6, dtype=dtype),
        torch.randn(2, kv_heads, keys, 6, dtype=dtype),
        torch.randn(2, kv_heads, keys, 5, dtype=dtype),
    ]


def tempered_logits(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    return reference.logits(query, key, **options) / TEMPERATURE


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [1, 3])
def test_results_are_those_of_the_chosen_keys(estimator: str, n: int, options: dict[str, Any], isa: str) -> None:
    query, key, value = qkv()
    result = torch_attn.hard_attention(
        query, key, value, **options, estimator=estimator, num_samples=n, k=n, temperature=TEMPERATURE, enable_gqa=True
    )
    logits = tempered_logits(query, key, options)
    indices, log_prob, output = result.indices, result.log_prob, result.output
    rows = (2, 4, 9)
    if estimator == "top_k":
        assert indices.shape == log_prob.shape == (*rows, n) and output.shape == (*rows, 5)
    elif estimator == "argmax" or n == 1:
        assert indices.shape == log_prob.shape == rows and output.shape == (*rows, 5)
        indices, log_prob, output = indices.unsqueeze(-1), log_prob.unsqueeze(-1), output.unsqueeze(-2)
    else:
        assert indices.shape == log_prob.shape == (n, *rows) and output.shape == (n, *rows, 5)
        indices, log_prob, output = indices.movedim(0, -1), log_prob.movedim(0, -1), output.movedim(0, -2)
    assert ((indices >= -1) & (indices < 41)).all()
    if estimator in ("argmax", "top_k"):
        best = reference.choose_keys(logits, indices.size(-1))
        assert torch.equal(indices, best.masked_fill(best == 41, -1))
    candidates = torch.where(indices == -1, 41, indices) if "sinks" in options else indices
    wanted = reference.hard_attention(value, logits, candidates, renormalise=estimator == "top_k")
    if estimator != "top_k":
        assert torch.equal(output, wanted[0])
    torch.testing.assert_close((output, log_prob, result.entropy), wanted)


def differentiable(options: dict[str, Any]) -> dict[str, Tensor]:
    return {n: x for n, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_the_output_are_the_documented_ones(estimator: str, options: dict[str, Any], isa: str) -> None:
    names = ["query", "key", "value", *differentiable(options)]
    tensors = dict(zip(names, [*qkv(), *differentiable(options).values()], strict=True))
    ours = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    theirs = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
    result = torch_attn.hard_attention(
        **(options | ours), estimator=estimator, num_samples=2, k=3, temperature=TEMPERATURE, enable_gqa=True
    )
    plain = {n: x for n, x in (options | theirs).items() if n != "value"}
    logits = reference.logits(**plain) / TEMPERATURE
    indices = result.indices.unsqueeze(-1) if estimator == "argmax" else result.indices
    indices = indices if estimator in ("argmax", "top_k") else indices.movedim(0, -1)
    indices = torch.where(indices == -1, 41, indices) if "sinks" in options else indices
    output = reference.hard_attention(theirs["value"], logits, indices, renormalise=estimator == "top_k")[0]
    if estimator == "straight_through":
        # soft attention's gradient for all but value: hard + (soft - soft without gradient)
        empty = (logits == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(empty, 0), -1).masked_fill(empty, 0)[..., :41]
        soft = weights @ theirs["value"].detach().repeat_interleave(2, 1)
        output = output + (soft - soft.detach()).unsqueeze(-2)
    if estimator == "argmax":
        output = output.squeeze(-2)
    elif estimator != "top_k":
        output = output.movedim(-2, 0)
    torch.testing.assert_close(result.output, output)
    weight = torch.randn_like(output)
    actual = torch.autograd.grad((result.output * weight).sum(), list(ours.values()), allow_unused=True)
    wanted = torch.autograd.grad((output * weight).sum(), list(theirs.values()), allow_unused=True)
    for name, a, b in zip(names, actual, wanted, strict=True):
        a, b = (torch.zeros_like(tensors[name]) if x is None else x for x in (a, b))
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def replayed(estimator: str, what: str, options: dict[str, Any]) -> Any:
    def function(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Any:
        torch.manual_seed(3)
        named = dict(zip(differentiable(options), rest, strict=True))
        result = torch_attn.hard_attention(
            *(query, key, value),
            **(options | named),
            estimator=estimator,
            num_samples=2,
            k=2,
            temperature=TEMPERATURE,
            enable_gqa=True,
        )
        return getattr(result, what)

    return function


SMALL: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {
        "attn_mask": torch.randn(1, 2, 3, 4, dtype=torch.float64),
        "alibi_slopes": torch.rand(2, dtype=torch.float64),
        "sinks": torch.randn(2, dtype=torch.float64),
        "softcap": 2.0,
        "window_left": 1,
    },
}


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL.keys())
@pytest.mark.parametrize(
    ("estimator", "what"),
    [
        ("reinforce", "log_prob"),
        ("reinforce", "entropy"),
        ("reinforce", "output"),
        ("top_k", "output"),
        ("top_k", "log_prob"),
    ],
)
def test_derivatives_to_the_second_order(estimator: str, what: str, options: dict[str, Any]) -> None:
    inputs = [
        torch.randn(1, 2, 3, 2),
        torch.randn(1, 1, 4, 2),
        torch.randn(1, 1, 4, 2),
        *differentiable(options).values(),
    ]
    inputs = [x.double().requires_grad_() for x in inputs]
    function = replayed(estimator, what, options)
    torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_undefined_grad=False)
    torch.autograd.gradgradcheck(function, inputs)


def test_func_transforms_agree_with_autograd() -> None:
    inputs = qkv(rows=3, keys=5)

    def loss(*args: Tensor) -> Tensor:
        torch.manual_seed(3)
        result = torch_attn.hard_attention(*args, num_samples=2, enable_gqa=True)
        return (result.log_prob.sin().sum() + result.entropy.square().sum()) + result.output.square().sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(grad(loss, (0, 1, 2))(*inputs), wanted)
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, along = jvp(loss, tuple(inputs), tangents)
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(wanted, tangents, strict=True)))


class TestVmap:
    def test_equals_a_loop(self) -> None:
        inputs = [torch.stack([x, -x, 2 * x]) for x in qkv()]

        def function(*args: Tensor) -> tuple[Tensor, ...]:
            return tuple(torch_attn.hard_attention(*args, estimator="top_k", k=3, enable_gqa=True))

        expected = [
            torch.stack(x) for x in zip(*(function(*sample) for sample in zip(*inputs, strict=True)), strict=True)
        ]
        torch.testing.assert_close(list(vmap(function)(*inputs)), expected)

    def test_per_sample_gradients(self) -> None:
        inputs = [torch.stack([x, -x]) for x in qkv()]

        def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            result = torch_attn.hard_attention(query, key, value, estimator="top_k", k=3, enable_gqa=True)
            return result.output.square().sum() + result.log_prob.sum() + result.entropy.sum()

        actual = vmap(grad(loss, (0, 1, 2)))(*inputs)
        for i in range(2):
            torch.testing.assert_close(tuple(g[i] for g in actual), grad(loss, (0, 1, 2))(*(x[i] for x in inputs)))

    def test_randomness_modes(self) -> None:
        inputs = [torch.stack([x] * 3) for x in qkv()]

        def indices(*args: Tensor) -> Tensor:
            return torch_attn.hard_attention(*args, num_samples=4, enable_gqa=True).indices

        with pytest.raises(RuntimeError, match="randomness"):
            vmap(indices)(*inputs)
        same = vmap(indices, randomness="same")(*inputs)
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        different = vmap(indices, randomness="different")(*inputs)
        assert not torch.equal(different[0], different[1])


def test_seeds_and_generators_reproduce_draws() -> None:
    inputs = qkv()

    def draw(generator: torch.Generator | None = None) -> Tensor:
        return torch_attn.hard_attention(*inputs, num_samples=4, generator=generator, enable_gqa=True).indices

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(first, draw()) and not torch.equal(first, second)
    mine = torch.Generator().manual_seed(7)
    third, fourth = draw(mine), draw(mine)
    assert torch.equal(third, draw(torch.Generator().manual_seed(7))) and not torch.equal(third, fourth)


def test_draws_without_replacement_are_different_keys() -> None:
    result = torch_attn.hard_attention(*qkv(keys=5), num_samples=7, replacement=False, enable_gqa=True)
    assert torch.equal(result.indices[:5].sort(0).values, torch.arange(5).view(5, 1, 1, 1).expand(5, 2, 4, 9))
    assert (result.indices[5:] == -1).all() and (result.log_prob[5:] == 0).all() and (result.output[5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_dtypes(estimator: str, dtype: torch.dtype, isa: str) -> None:
    query, key, value = (x.requires_grad_() for x in qkv(dtype=dtype))
    result = torch_attn.hard_attention(query, key, value, estimator=estimator, k=3, enable_gqa=True)
    assert result.output.dtype == dtype and result.log_prob.dtype == result.entropy.dtype == torch.float32
    if estimator != "top_k":
        chosen = value.repeat_interleave(2, 1).gather(2, result.indices.unsqueeze(-1).expand(-1, -1, -1, 5))
        assert torch.equal(result.output, chosen)
    (result.output.float().sum() + result.log_prob.sum()).backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in (query, key, value))


@pytest.mark.parametrize("shapes", [((5, 4), (7, 4), (7, 3)), ((2, 1, 3, 5, 4), (2, 3, 7, 4), (3, 7, 3))], ids=str)
def test_leading_dimensions_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    expected = torch_attn.attention(*inputs)
    for n in (1, 2):
        result = torch_attn.hard_attention(*inputs, num_samples=n)
        leading = (n,) if n > 1 else ()
        assert result.output.shape == (*leading, *expected.shape)
        assert result.indices.shape == (*leading, *expected.shape[:-1]) and result.entropy.shape == expected.shape[:-1]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_has_the_size_of_the_scores(estimator: str) -> None:
    inputs = [torch.randn(1, 1, 128, 4, requires_grad=True) for _ in range(3)]
    with LargestResult() as largest:
        result = torch_attn.hard_attention(*inputs, estimator=estimator, num_samples=2, k=2)
        (result.output.sum() + result.log_prob.sum() + result.entropy.sum()).backward()
    assert 0 < largest.elements < 128 * 128


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "gumbel"}, "estimator.*gumbel"),
    ({"num_samples": 0}, "num_samples.*0"),
    ({"estimator": "top_k", "k": 0}, "k must.*0"),
    ({"temperature": 0.0}, "temperature.*0"),
    ({"temperature": math.inf}, "temperature.*inf"),
    ({"softcap": -1.0}, "softcap.*-1"),
    ({"attn_mask": torch.ones(3, 3)}, "attn_mask.*3, 3"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS, ids=[c[1] for c in BAD_CALLS])
def test_the_error_names_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"(?s){message}"):
        torch_attn.hard_attention(*qkv(), enable_gqa=True, **options)


class Reader(torch.nn.Module):
    def __init__(self, estimator: str) -> None:
        super().__init__()
        self.estimator = estimator
        self.project = torch.nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project(x).unsqueeze(1).chunk(3, -1)
        read = torch_attn.hard_attention(query, key, value, estimator=self.estimator, k=2, temperature=0.5)
        return read.output, read.log_prob, read.entropy


def outputs_and_gradients(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(11)
    module.zero_grad()
    outputs = module(x)
    sum((o.sin().sum() for o in outputs), torch.zeros(())).backward()
    return [*outputs, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_torchscript_reads_the_fields_by_name_and_trains_after_load(estimator: str) -> None:
    module, x = Reader(estimator), torch.randn(2, 7, 8)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert "torch_attn::hard_attention" in torch.jit.export_opnames(loaded)
    for _ in range(3):  # the profiling executor rewrites the graph on its first calls
        torch.testing.assert_close(outputs_and_gradients(loaded, x), outputs_and_gradients(module, x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compile_has_no_graph_break_and_stays_dynamic(estimator: str) -> None:
    torch._dynamo.reset()
    module = Reader(estimator)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((2, 7), (3, 12)):
            x = torch.randn(batch, length, 8)
            torch.testing.assert_close(outputs_and_gradients(compiled, x), outputs_and_gradients(module, x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_autocast(estimator: str) -> None:
    inputs = [x.requires_grad_() for x in qkv(dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = torch_attn.hard_attention(*inputs, estimator=estimator, k=2, enable_gqa=True)
    assert result.output.dtype == torch.bfloat16 and result.log_prob.dtype == torch.float32
    (result.output.float().sum() + result.log_prob.sum()).backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


def test_checkpoint_replays_the_draws() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = [x.requires_grad_() for x in qkv()]

    def function(*args: Tensor) -> Tensor:
        result = torch_attn.hard_attention(*args, num_samples=3, enable_gqa=True)
        return result.output.square().sum() + result.log_prob.sin().sum()

    torch.manual_seed(3)
    plain = torch.autograd.grad(function(*inputs), inputs)
    torch.manual_seed(3)
    assert all(map(torch.equal, torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False), inputs), plain))


class TestOpcheck:
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_select_keys(self, requires_grad: bool) -> None:
        query, key, _ = (x.float().requires_grad_(requires_grad) for x in qkv(rows=3, keys=5))
        mask = torch.randn(1, 4, 3, 5, requires_grad=requires_grad)
        options = {"attn_mask": mask, "sinks": torch.randn(4), "is_causal": True, "count": 2}
        tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if not requires_grad:  # the last test adds all results to the first, which here is of integers
            tests.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(ops.select_keys.default, (query, key), options, test_utils=tests)

    def test_backward(self) -> None:
        query, key, _ = (x.float() for x in qkv(rows=3, keys=5))
        indices, scores, log_prob, entropy, logsumexp, _ = ops.select_keys(query, key, count=2)
        given = [torch.randn_like(x) for x in (scores, log_prob, entropy, logsumexp)]
        for kept in (given, [given[0], None, None, None]):
            args = (*kept, query, key, indices, entropy, logsumexp)
            wanted = [True, True, False, False, False]
            torch.library.opcheck(ops.select_keys_backward.default, args, {"output_mask": wanted})

    @pytest.mark.parametrize("weighted", [False, True])
    def test_gather(self, weighted: bool) -> None:
        value = torch.randn(2, 2, 5, 3, requires_grad=True)
        indices = torch.randint(-1, 6, (2, 4, 3, 2))
        weights = torch.randn(2, 4, 3, 2, requires_grad=True) if weighted else None
        torch.library.opcheck(ops.gather_values.default, (value, indices, weights))
        args = (torch.randn(2, 4, 3, 3), value.detach(), indices, weights.detach() if weighted else None)
        torch.library.opcheck(ops.gather_values_backward.default, (*args, [True, weighted]))

    def test_hard_attention(self) -> None:
        inputs = [x.float().requires_grad_() for x in qkv(rows=3, keys=5)]
        options = {"estimator": "top_k", "k": 2, "temperature": 0.5, "enable_gqa": True}
        torch.library.opcheck(ops.hard_attention.default, tuple(inputs), options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 5, 16, 70])
def test_gather_values_in_any_width_and_on_any_threads(columns: int, dtype: torch.dtype, isa: str) -> None:
    value = torch.randn(2, 2, 50, columns).to(dtype).requires_grad_()
    indices = torch.randint(-1, 51, (2, 4, 70, 3))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(2, 4, 70, 3, dtype=accumulator, requires_grad=True)
    one_hot = torch.nn.functional.one_hot(indices + 1, 52)[..., 1:51].double()
    exact_value, exact_weights = (x.detach().double().requires_grad_() for x in (value, weights))
    exact = (one_hot * exact_weights.unsqueeze(-1)).sum(-2) @ exact_value.repeat_interleave(2, 1)
    upstream = torch.randn_like(exact).to(dtype)
    wanted = torch.autograd.grad(exact, [exact_value, exact_weights], upstream.double())
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = ops.gather_values(value, indices, weights)
        results.append([out, *torch.autograd.grad(out, [value, weights], upstream)])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
    for actual, expected in zip(results[0], [exact, *wanted], strict=True):
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=100 * eps)
