"""docs/long_context.md: its code runs and computes what it says, and its figures are those that were measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import torch_attn
from benchmarks.limits import memory

REPOSITORY = Path(__file__).parents[1]
GUIDE = (REPOSITORY / "docs" / "long_context.md").read_text(encoding="utf-8")
MEASURED = REPOSITORY / "benchmarks" / "results" / "long_context.json"
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 8


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def draw(heads: int, length: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, heads, length, DIM)


def packing() -> dict[str, Any]:
    width = HEADS * DIM
    sequences = [torch.randint(11, (length,)) for length in (5, 2, 9)]
    modules = {"embedding": nn.Embedding(11, width), "projection": nn.Linear(width, 3 * width)}
    return modules | {"sequences": sequences, "heads": HEADS}


def check_packing(names: dict[str, Any]) -> None:
    parts = [names[name].split([5, 2, 9]) for name in ("query", "key", "value", "attended")]
    for query, key, value, attended in zip(*parts, strict=True):
        exact = torch_attn.attention(*(x.transpose(0, 1) for x in (query, key, value)), is_causal=True)
        torch.testing.assert_close(attended, exact.transpose(0, 1))
    torch.testing.assert_close(torch.cat(names["per_sequence"]), names["attended"])
    assert names["projection"].weight.grad is not None


def paging() -> dict[str, Any]:
    sizes = {"number_of_blocks": 8, "block_size": 4, "kv_heads": KV_HEADS, "head_dim": DIM}
    table = {"block_table": torch.tensor([[3, 0], [6, 2]], dtype=torch.int32), "first_lengths": torch.tensor([0, 0])}
    tokens = [(draw(HEADS, 1), draw(KV_HEADS, 1), draw(KV_HEADS, 1)) for _ in range(7)]
    return sizes | table | {"paged_tokens": tokens}


def check_paging(names: dict[str, Any]) -> None:
    query, key, value = (torch.cat(x, 2) for x in zip(*names["paged_tokens"], strict=True))
    exact = torch_attn.attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(names["paged_out"], exact[:, :, -1:])


def decoding() -> dict[str, Any]:
    cache = {"batch_size": BATCH, "kv_heads": KV_HEADS, "max_length": 16, "head_dim": DIM}
    prompt = {"prompt_query": draw(HEADS, 5), "prompt_key": draw(KV_HEADS, 5), "prompt_value": draw(KV_HEADS, 5)}
    tokens = [(draw(HEADS, 1), draw(KV_HEADS, 1), draw(KV_HEADS, 1)) for _ in range(3)]
    return cache | prompt | {"prompt_lengths": torch.tensor([5, 2]), "new_tokens": tokens}


def check_decoding(names: dict[str, Any]) -> None:
    for entry, count in enumerate([5, 2]):
        query, key, value = (
            torch.cat(
                [names[f"prompt_{name}"][entry, :, :count], *(token[i][entry] for token in names["new_tokens"])], 1
            )
            for i, name in enumerate(("query", "key", "value"))
        )
        exact = torch_attn.attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(names["prompt_out"][entry, :, :count], exact[:, :count])
        torch.testing.assert_close(names["out"][entry], exact[:, -1:])


def merging() -> dict[str, Any]:
    own = {name: draw(HEADS, 6) for name in ("query", "own_key", "own_value")}
    return own | {name: draw(HEADS, 7, batch=1) for name in ("prefix_key", "prefix_value")}


def check_merging(names: dict[str, Any]) -> None:
    key, value = (
        torch.cat([names[f"prefix_{name}"].expand(BATCH, -1, -1, -1), names[f"own_{name}"]], 2)
        for name in ("key", "value")
    )
    exact = torch_attn.attention(
        names["query"], key, value, is_causal=True, causal_alignment="bottom_right", return_logsumexp=True
    )
    torch.testing.assert_close((names["out"], names["logsumexp"]), exact)


def sharing() -> dict[str, Any]:
    width = HEADS * DIM
    modules = {
        "embedding": nn.Embedding(11, width),
        "position_embedding": nn.Embedding(20, width),
        "projection": nn.Linear(width, 3 * width),
        "head": nn.Linear(width, 11),
    }
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    sequence = {f"long_{name}": draw(HEADS, 13) for name in ("query", "key", "value")}
    return modules | sequence | {"heads": HEADS, "parameters": parameters, "tokens": torch.randint(11, (BATCH, 17))}


def check_sharing(names: dict[str, Any]) -> None:
    assert names["all_logits"].shape == (BATCH, 16, 11)
    assert all(parameter.grad is not None for parameter in names["parameters"])
    exact = torch_attn.attention(*(names[f"long_{name}"] for name in ("query", "key", "value")))
    torch.testing.assert_close(names["long_out"], exact)


SECTIONS = {
    "Training without padding": (packing, check_packing),
    "Decoding with a cache": (decoding, check_decoding),
    "Decoding with a paged cache": (paging, check_paging),
    "Merging parts": (merging, check_merging),
    "Ring attention": (sharing, check_sharing),
}


def code_of(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_code_of_the_guide_runs(title: str, group_of_one: None) -> None:
    inputs, check = SECTIONS[title]
    (section,) = [text for text in GUIDE.split("\n## ") if text.startswith(f"{title}\n")]
    names: dict[str, Any] = {"torch": torch, "torch_attn": torch_attn, **inputs()}
    for code in code_of(section):
        exec(compile(code, "docs/long_context.md", "exec"), names)
    check(names)


def test_all_code_of_the_guide_is_run() -> None:
    with_code = [text.split("\n", 1)[0] for text in GUIDE.split("\n## ")[1:] if code_of(text)]
    assert with_code == list(SECTIONS)


def test_the_figures_are_those_that_were_measured() -> None:
    rows = json.loads(MEASURED.read_text())["results"]
    assert 65536 in {row["length"] for row in rows}
    for row in rows:
        if row["ranks"] > 1:
            assert row["dtype"] != "float32" or f"a rank of four needed\n{row['peak_mib']:.0f} MiB" in GUIDE
            continue
        mask = "causal" if row["is_causal"] else "full"
        sizes = [row["inputs_mib"], row["tensors_mib"], row["peak_mib"], row["score_matrix_mib"]]
        cells = [f"{row['length']:,}", row["dtype"], mask, *(f"{size:,.0f}" for size in sizes)]
        assert f"| {' | '.join(cells)} | {row['cpu_seconds']:.1f} |" in GUIDE
        assert row["peak_mib"] < 2 * row["inputs_mib"] + 8, "O(L)"


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """A process of its own, as when the figures were measured."""
    measured = memory(8192, "float32", is_causal=True)
    # The resident set is counted in pages, and some may have been there before.
    assert 0.9 * measured.tensors_mib < measured.peak_mib < measured.score_matrix_mib / 8
