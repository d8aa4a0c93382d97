"""The ring attention calls that the processes of worker.py make and test_ring_attention.py judges.

Lengths are multiples of 8: four processes, two parts each in the layout "zigzag".
"""

from __future__ import annotations

from typing import get_args

import torch

from torch_attn.distributed import Layout

from ..cases import CAUSAL, Case
from ..oracle import Call

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
WORLD_SIZES = (2, 4)


def key_lengths(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """None, some, and all of the keys: the first entry's rows are empty."""
    some = int(torch.randint(1, case.key_length, ()))
    return {"key_lengths": torch.tensor([0, some, case.key_length], dtype=torch.int32)}


CASES = [
    Case("full", query_length=40, key_length=40),
    Case("causal", query_length=72, key_length=72, options=CAUSAL),
    Case("two_rows_each", query_length=8, key_length=8, options=CAUSAL),
    Case("cross", query_length=24, key_length=56, value_dim=5),
    Case("causal_more_keys", query_length=24, key_length=56, options=CAUSAL),
    Case("causal_more_queries", query_length=56, key_length=24, options=CAUSAL),
    Case("grouped_query", heads=6, kv_heads=2, query_length=32, key_length=32),
    Case("grouped_query_causal", heads=4, kv_heads=1, query_length=48, key_length=48, options=CAUSAL),
    Case("heads_inside", query_length=32, key_length=32, layout="heads_inside", options=CAUSAL),
    Case("window", query_length=64, key_length=64, options={"window_left": 9, "window_right": 4}),
    Case("window_causal", query_length=64, key_length=64, options=CAUSAL | {"window_left": 21}),
    Case("window_of_one_key", query_length=24, key_length=24, options={"window_left": 0, "window_right": 0}),
    Case("window_right_only", query_length=48, key_length=24, options={"window_right": 3}),
    Case("key_lengths", batch=3, query_length=40, key_length=48, draw=key_lengths),
    Case("key_lengths_causal", batch=3, query_length=48, key_length=48, draw=key_lengths, options=CAUSAL),
    Case("no_keys", query_length=16, key_length=0),
    Case("scale_and_softcap", query_length=32, key_length=32, options={"scale": -0.7, "softcap": 2.0}),
]
CASE_BY_NAME = {case.name: case for case in CASES}
# In other dtypes than float64 a few, as the arithmetic is the same.
DTYPES = {torch.float64: list(CASE_BY_NAME)} | dict.fromkeys(
    (torch.float32, torch.bfloat16, torch.float16), ["full", "grouped_query_causal", "window", "key_lengths"]
)
RUNS = [(name, dtype, layout) for dtype, names in DTYPES.items() for name in names for layout in LAYOUTS]


def draw(name: str, dtype: torch.dtype) -> Call:
    case = CASE_BY_NAME[name]
    query, key, value = case.tensors(dtype)
    shape = (case.batch, case.heads, case.query_length)
    grad_out = torch.randn(*shape, case.value_dim).to(dtype)
    grad_logsumexp = torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return Call(query, key, value, case.kwargs(dtype), grad_out, grad_logsumexp)


def rows_of(layout: Layout, length: int, rank: int, world_size: int) -> list[int]:
    """The layouts' definitions, row by row."""
    if layout == "striped":
        return [row for row in range(length) if row % world_size == rank]
    if layout == "contiguous":
        return [row for row in range(length) if row * world_size // length == rank]
    parts = 2 * world_size
    return [row for row in range(length) if row * parts // length in (rank, parts - 1 - rank)]
