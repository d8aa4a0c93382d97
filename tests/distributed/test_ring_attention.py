"""Two and four processes that share a sequence compute what one computes, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import torch_attn
from torch_attn.distributed import Layout, ring_attention

from ..conftest import SESSION_SEED
from ..oracle import Call, assert_accurate, backward, max_error
from .ring_cases import DTYPES, LAYOUTS, RUNS, WORLD_SIZES, draw, rows_of
from .ring_model import attend_alone, train

REPOSITORY = Path(__file__).parents[2]


class Runs:
    """What all ranks of one world size saved."""

    def __init__(self, inputs: dict[Any, Any], ranks: list[dict[Any, Any]]) -> None:
        self.inputs = inputs
        self.ranks = ranks

    def whole(self, layout: Layout, shards: list[Tensor], dim: int = 2) -> Tensor:
        """Shards put together by the layout's definition."""
        length = sum(shard.size(dim) for shard in shards)
        sequence = torch.cat(shards, dim).clone()
        rows = [rows_of(layout, length, rank, len(shards)) for rank in range(len(shards))]
        return sequence.index_copy(dim, torch.tensor(sum(rows, []), dtype=torch.int64), torch.cat(shards, dim))

    def call(self, run: Any) -> dict[str, Tensor]:
        names = self.ranks[0][run]
        return {name: self.whole(run[2], [rank[run][name] for rank in self.ranks]) for name in names}


def draw_inputs(size: int) -> dict[Any, Any]:
    inputs: dict[Any, Any] = {(name, dtype): draw(name, dtype) for dtype, names in DTYPES.items() for name in names}
    inputs["padded"] = [torch.randn(2, 2, 8 * size - 3, 5, dtype=torch.float64) for _ in range(3)]
    inputs["tokens"] = torch.randint(100, (2, 8 * size - 1))
    inputs["flags"] = torch.rand(16) < 0.5
    inputs["half"] = torch.randn(2, 16, 3).bfloat16()
    call = draw("causal", torch.float64)
    offset = 1000.0  # every score is near scale · offset² · 16 = 6000, and they differ by a few units
    large = (call.query + offset, call.key + offset, call.value, {"is_causal": True, "scale": 3.75e-4})
    inputs["large"] = Call(*large, call.grad_out, call.grad_logsumexp)
    return inputs


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Runs]:
    folder = tmp_path_factory.mktemp("ring")
    torch.manual_seed(SESSION_SEED)
    inputs = {size: draw_inputs(size) for size in WORLD_SIZES}
    for size in WORLD_SIZES:
        torch.save(inputs[size], folder / f"inputs{size}.pt")
    command = [sys.executable, "-m", f"{__package__}.worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), folder], cwd=REPOSITORY, env=environment)
        for rank in range(max(WORLD_SIZES))
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()

    def results(size: int) -> list[dict[Any, Any]]:
        return [torch.load(folder / f"results{size}_{rank}.pt", weights_only=False) for rank in range(size)]

    return {size: Runs(inputs[size], results(size)) for size in WORLD_SIZES}


@pytest.fixture(params=WORLD_SIZES, ids=lambda size: f"{size} processes")
def runs(request: pytest.FixtureRequest, all_runs: dict[int, Runs]) -> Runs:
    return all_runs[request.param]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}-{str(run[1])[6:]}-{run[2]}")
def test_the_ring_computes_what_one_process_computes(runs: Runs, run: Any) -> None:
    """Half precision is judged as kernels that round weights are: a ring rounds each round's output."""
    actual = runs.call(run)
    call = runs.inputs[run[:2]]
    assert actual["out"].dtype == actual["grad_key"].dtype == run[1]
    assert_accurate(call, actual, None, rounds_weights=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_logsumexp_does_not_rescale_the_rows(runs: Runs, layout: Layout) -> None:
    """A kernel's backward renormalises such rows, which in a ring have other keys elsewhere."""
    shards = [rank["large_logsumexp"][layout] for rank in runs.ranks]
    actual = {name: runs.whole(layout, [shard[name] for shard in shards]) for name in shards[0]}
    call = runs.inputs["large"]
    leaves = {name: x.clone().requires_grad_() for name, x in call.leaves().items()}
    out, logsumexp = torch_attn.attention(**leaves, **call.options, return_logsumexp=True)
    assert logsumexp.min() > 4096
    exact = {"out": out, "logsumexp": logsumexp} | backward(call, leaves, out, logsumexp)
    for name, x in exact.items():
        assert max_error(actual[name], x.detach()) <= 1e-9 * x.abs().max().item(), name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_nothing(runs: Runs, layout: Layout, is_causal: bool) -> None:
    leaves = [x.clone().requires_grad_() for x in runs.inputs["padded"]]
    out = torch_attn.attention(*leaves, is_causal=is_causal)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, out.detach().sin())]
    for rank in runs.ranks:  # unshard_sequence gave all of it to all of them
        torch.testing.assert_close(rank["padded"][f"{layout} {is_causal}"], exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_are_dealt_out_and_put_together(runs: Runs, layout: Layout) -> None:
    for name, dim in (("tokens", 1), ("flags", 0), ("half", -2)):
        sequence = runs.inputs[name]
        shards = [rank["dealt_out"][f"{layout} {name}"] for rank in runs.ranks]
        dealt = runs.whole(layout, [shard for shard, _ in shards], dim)
        length = sequence.size(dim)
        assert torch.equal(dealt.narrow(dim, 0, length), sequence)
        assert not dealt.narrow(dim, length, dealt.size(dim) - length).any()
        assert all(torch.equal(whole, sequence) for _, whole in shards)
    for rank, saved in enumerate(runs.ranks):
        size = len(runs.ranks)
        assert saved["dealt_out"][f"{layout} positions"].tolist() == rows_of(layout, 6 * size, rank, size)


def test_a_ring_may_be_a_mesh_or_some_of_the_processes(runs: Runs) -> None:
    call, groups = runs.inputs["causal", torch.float64], [rank["groups"] for rank in runs.ranks]
    for name, x in runs.ranks[0]["causal", torch.float64, "zigzag"].items():
        assert torch.equal(groups[0]["mesh"][name], x)
    halves = len(groups) // 2
    for rank, saved in enumerate(groups):
        exact = torch_attn.attention(call.query + rank % halves, call.key, call.value, is_causal=True)
        torch.testing.assert_close(saved["half"], exact)
        assert halves == 1 or "group must be one that this process belongs to" in saved["foreign"]


@pytest.mark.parametrize("wanted", ["query", "key", "value", "query value", "of logsumexp"])
def test_gradients_that_are_not_wanted_change_no_others(runs: Runs, wanted: str) -> None:
    call = runs.inputs["causal", torch.float64]
    leaves = {name: x.clone().requires_grad_() for name, x in call.leaves().items()}
    out, logsumexp = torch_attn.attention(**leaves, is_causal=True, return_logsumexp=True)
    result, grad = (logsumexp, call.grad_logsumexp) if wanted == "of logsumexp" else (out, call.grad_out)
    exact = dict(zip(leaves, torch.autograd.grad(result, list(leaves.values()), grad, allow_unused=True), strict=True))
    saved = [rank["some_gradients"][wanted] for rank in runs.ranks]
    for name in saved[0]:
        actual = runs.whole("zigzag", [grads[name] for grads in saved])
        torch.testing.assert_close(actual, exact[name] if exact[name] is not None else torch.zeros_like(actual))
    assert all(not rank["some_gradients"]["none"].requires_grad for rank in runs.ranks)


def test_autocast_casts_query_key_and_value(runs: Runs) -> None:
    for saved in (rank["under_autocast"] for rank in runs.ranks):
        assert saved["out"].dtype == torch.bfloat16 and torch.equal(saved["out"], saved["expected"])
        assert saved["grads"] == [torch.float32] * 3


def test_checkpointed_layers_have_the_same_gradients(runs: Runs) -> None:
    for saved in (rank["checkpointed"] for rank in runs.ranks):
        torch.testing.assert_close(saved["checkpointed"], saved["plain"])


def test_a_ring_of_one_process_compiles() -> None:
    """With a graph break, for the ring runs as it is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        leaves = [torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

        def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return ring_attention(query.sin(), key, value, is_causal=True).cos()

        out = torch.compile(layer, backend="eager")(*leaves)
        exact = torch_attn.attention(leaves[0].sin(), *leaves[1:], is_causal=True).cos()
        torch.testing.assert_close(out, exact)
        grads = [torch.autograd.grad(x.sum(), leaves) for x in (out, exact)]
        torch.testing.assert_close(*grads)
    finally:
        dist.destroy_process_group()


def test_a_rank_holds_no_tensor_larger_than_its_shards(runs: Runs) -> None:
    assert all(rank["memory"]["largest"] == 1 for rank in runs.ranks)


def test_a_language_model_trains_to_the_losses_of_one_process(runs: Runs) -> None:
    alone = train(attend_alone, lambda x: x)
    assert alone[-1] < alone[0]
    for rank in runs.ranks:
        assert rank["trained"] == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize(
    "name, message",
    [
        ("layout", 'ValueError: ring_attention: layout must be "contiguous", "zigzag" or "striped", but it is'),
        ("shard layout", "ValueError: shard_sequence: layout must be"),
        ("odd", "ValueError: ring_attention: query must have an even number of rows on each rank"),
        ("odd shard", "ValueError: unshard_sequence: dimension -2 of shard must be even"),
        ("odd positions", "ValueError: shard_positions: rows must be even"),
        ("dims", "ValueError: ring_attention: query must have 4 dimensions"),
        ("heads", "ValueError: ring_attention: query and key must have the same number of heads unless enable_gqa"),
        ("dtype", "RuntimeError: attention: query, key and value must have the same dtype"),
        ("window", "ValueError: ring_attention: window_left must be None (no bound) or an integer of at least 0"),
        ("softcap", "ValueError: attention: softcap must be 0 (off) or positive"),
        ("key_lengths", "RuntimeError: attention: key_lengths must have shape (batch,) = (1,)"),
        ("indivisible", "but it is 13; pad=True appends zeros."),
        ("length", "ValueError: unshard_sequence: length must be between 0 and"),
        ("twice", "RuntimeError: ring_attention can be differentiated once only"),
    ],
)
def test_errors_say_what_is_wrong_on_every_rank(runs: Runs, name: str, message: str) -> None:
    for rank in runs.ranks:
        assert message in rank["errors"][name]
