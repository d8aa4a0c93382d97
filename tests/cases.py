"""The one list of attention calls that the kernel, derivative and compiler tests are parametrised from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of attention: sizes, memory layout, and how its options are drawn."""

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    query_length: int = 37
    key_length: int = 37
    head_dim: int = 16
    value_dim: int = 16
    layout: str = "heads_first"  # or "heads_inside": storage (B, L, H, D), as nn.MultiheadAttention's projections give
    options: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[Case, torch.dtype], dict[str, Any]] | None = None  # options that are tensors

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        def make(heads: int, length: int, dim: int) -> Tensor:
            if self.layout == "heads_inside":
                return torch.randn(self.batch, length, heads, dim).to(dtype).transpose(1, 2)
            return torch.randn(self.batch, heads, length, dim).to(dtype)

        return (
            make(self.heads, self.query_length, self.head_dim),
            make(self.kv_heads, self.key_length, self.head_dim),
            make(self.kv_heads, self.key_length, self.value_dim),
        )

    def kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        return {**self.options, **(self.draw(self, dtype) if self.draw else {})}

    def __str__(self) -> str:
        return self.name


def float_mask(*sizes: str, dtype: torch.dtype | None = None) -> Callable[[Case, torch.dtype], dict[str, Any]]:
    """A float mask of which the named dimensions (of B, H, L, S) are full and the others 1."""

    def draw(case: Case, input_dtype: torch.dtype) -> dict[str, Any]:
        full = {"B": case.batch, "H": case.heads, "L": case.query_length, "S": case.key_length}
        shape = [full[d] if d in sizes else 1 for d in "BHLS"]
        return {"attn_mask": torch.randn(shape).to(dtype or input_dtype)}

    return draw


def bool_mask(*sizes: str, empty_rows: bool = False) -> Callable[[Case, torch.dtype], dict[str, Any]]:
    def draw(case: Case, input_dtype: torch.dtype) -> dict[str, Any]:
        mask = float_mask(*sizes)(case, torch.float32)["attn_mask"] > -0.5
        if empty_rows:
            mask[..., ::3, :] = False
        return {"attn_mask": mask}

    return draw


def bool_mask_by_blocks(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Blocks in which nothing is attended, everything, or some keys: kernels tell these apart."""
    mask = bool_mask("H", "L", "S")(case, dtype)["attn_mask"]
    rows, keys = case.query_length // 2, 2 * case.key_length // 3
    mask[..., :rows, :keys] = False
    mask[..., rows:, :keys] = True
    return {"attn_mask": mask}


def key_major(draw: Callable[[Case, torch.dtype], dict[str, Any]]) -> Callable[[Case, torch.dtype], dict[str, Any]]:
    """The same mask with neighbouring rows, not keys, next to each other in memory."""

    def draw_transposed(case: Case, dtype: torch.dtype) -> dict[str, Any]:
        return {"attn_mask": draw(case, dtype)["attn_mask"].transpose(2, 3).contiguous().transpose(2, 3)}

    return draw_transposed


def key_lengths(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    lengths = torch.randint(0, case.key_length + 1, (case.batch,))
    lengths[0] = 0
    lengths[-1] = case.key_length - 1
    return {"key_lengths": lengths}


def alibi(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"alibi_slopes": torch.rand(case.heads).to(torch.float64 if dtype == torch.float64 else torch.float32)}


def alibi_per_batch(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return {"alibi_slopes": torch.rand(case.batch, case.heads).to(accumulator)}


def sinks(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"sinks": torch.randn(case.heads).to(torch.float64 if dtype == torch.float64 else torch.float32)}


def everything(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    mask = float_mask("H", "L", "S")(case, dtype)
    mask["attn_mask"][..., 2, :] = -math.inf
    return mask | key_lengths(case, dtype) | alibi_per_batch(case, dtype) | sinks(case, dtype)


def extreme_mask_rows(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Rows whose every key carries the dtype's minimum or −1e9: attention there is uniform, not empty."""
    mask = torch.zeros(1, 1, case.query_length, case.key_length)
    mask[..., 3, :] = torch.finfo(torch.float32).min
    mask[..., 4, :] = -1e9
    mask[..., 5, :] = -10000.0
    return {"attn_mask": mask}


CAUSAL = {"is_causal": True}
CASES = [
    Case("plain"),
    Case("heads_inside", layout="heads_inside", heads=3, kv_heads=3),
    Case("one_row_one_key", query_length=1, key_length=1),
    Case("decode", query_length=1, key_length=131, head_dim=64, value_dim=64),
    Case("decode_grouped", heads=6, kv_heads=2, query_length=3, key_length=150, head_dim=40, value_dim=24),
    Case("decode_rows", query_length=11, key_length=200, options=CAUSAL | {"causal_alignment": "bottom_right"}),
    Case("decode_two_rows", query_length=2, key_length=170, head_dim=64, value_dim=64),
    # Several blocks of keys that are read in place, and a part of one; 6 rows share a key/value head, 28 rows do.
    Case("decode_blocks", heads=4, kv_heads=2, query_length=3, key_length=600, head_dim=64, value_dim=64),
    Case("decode_two_tiles_of_rows", heads=8, kv_heads=2, query_length=7, key_length=330, head_dim=96, value_dim=128),
    Case("decode_16_rows", query_length=16, key_length=300, head_dim=64, value_dim=64, options=CAUSAL),
    # float16 in pieces on AMX (decode_pieces.h): blocks of 512 keys that all rows attend and that some do, strided
    # rows, values unlike keys; 8 and 16 rows to a tile.
    Case(
        "decode_in_pieces",
        heads=4,
        kv_heads=4,
        query_length=8,
        key_length=1600,
        head_dim=32,
        value_dim=128,
        layout="heads_inside",
        options=CAUSAL | {"causal_alignment": "bottom_right", "window_left": 1400},
    ),
    Case("decode_groups_in_pieces", heads=6, kv_heads=2, query_length=5, key_length=1087, head_dim=96, value_dim=64),
    # More than 8 MiB of float32: 9 to 16 rows decode, too.
    Case(
        "decode_cache_in_memory",
        batch=1,
        heads=1,
        kv_heads=1,
        query_length=12,
        key_length=8300,
        head_dim=128,
        value_dim=128,
    ),
    Case(
        "decode_everything",
        heads=4,
        kv_heads=1,
        query_length=5,
        key_length=150,
        draw=everything,
        options=CAUSAL | {"window_left": 100, "softcap": 5.0, "dropout_p": 0.2, "causal_alignment": "bottom_right"},
    ),
    Case("odd_dims", head_dim=7, value_dim=5),
    Case("dim_one", head_dim=1, value_dim=1),
    Case("wide_value", head_dim=8, value_dim=40),
    Case("long", batch=1, query_length=301, key_length=517, head_dim=32, value_dim=32),
    Case("long_queries", batch=1, heads=1, kv_heads=1, query_length=700, key_length=19),
    Case("causal", options=CAUSAL, query_length=70, key_length=70),
    Case("causal_long", options=CAUSAL, batch=1, query_length=333, key_length=333, head_dim=64, value_dim=64),
    Case("causal_more_keys", options=CAUSAL, query_length=33, key_length=90),
    Case("causal_more_queries", options=CAUSAL, query_length=90, key_length=33),
    Case("causal_bottom_right", options=CAUSAL | {"causal_alignment": "bottom_right"}, query_length=33, key_length=90),
    Case("bottom_right_empty_rows", options=CAUSAL | {"causal_alignment": "bottom_right"}, query_length=90),
    Case("window", options={"window_left": 9, "window_right": 4}, query_length=200, key_length=210),
    Case("window_causal", options=CAUSAL | {"window_left": 40}, query_length=230, key_length=230),
    Case("window_left_of_all_keys", options={"window_left": 3, "window_right": 0}, query_length=150, key_length=40),
    Case("grouped_query", heads=6, kv_heads=2),
    Case("grouped_query_causal", heads=4, kv_heads=1, query_length=120, key_length=120, options=CAUSAL),
    Case("bool_mask", draw=bool_mask("B", "H", "L", "S")),
    Case("bool_mask_empty_rows", draw=bool_mask("L", "S", empty_rows=True), query_length=100, key_length=110),
    Case("key_padding_mask", draw=bool_mask("B", "S"), query_length=90, key_length=130),
    Case("bool_mask_by_blocks", draw=bool_mask_by_blocks, query_length=100, key_length=210),
    Case("bool_mask_key_major", draw=key_major(bool_mask("L", "S")), query_length=40, key_length=70),
    Case("float_mask_key_major", draw=key_major(float_mask("H", "L", "S")), query_length=40, key_length=70),
    Case("row_mask", draw=bool_mask("H", "L")),
    Case("float_mask", draw=float_mask("B", "H", "L", "S"), query_length=100, key_length=110),
    Case("float_mask_over_heads", draw=float_mask("B", "L", "S")),
    Case("float_mask_over_batch", draw=float_mask("H", "L", "S"), query_length=110, key_length=100),
    Case("float_mask_over_rows", draw=float_mask("B", "H", "S"), query_length=110),
    Case("float_mask_over_keys", draw=float_mask("B", "H", "L"), key_length=110),
    Case("float_mask_scalar", draw=float_mask()),
    Case("float32_mask", draw=float_mask("L", "S", dtype=torch.float32)),
    Case("float_mask_causal", draw=float_mask("H", "L", "S"), options=CAUSAL, query_length=75, key_length=75),
    Case("extreme_mask_rows", draw=extreme_mask_rows),
    Case("key_lengths", draw=key_lengths, batch=4, query_length=60, key_length=150),
    Case("key_lengths_bottom_right", draw=key_lengths, batch=4, options=CAUSAL | {"causal_alignment": "bottom_right"}),
    Case("alibi", draw=alibi, query_length=60, key_length=80),
    Case("alibi_bottom_right", draw=alibi_per_batch, key_length=80, options={"causal_alignment": "bottom_right"}),
    Case("softcap", options={"softcap": 3.0}),
    Case("softcap_large", options={"softcap": 50.0}, head_dim=64),
    Case("sinks", draw=sinks),
    Case("negative_scale", options={"scale": -0.7}),
    Case("dropout", options={"dropout_p": 0.3}, query_length=90, key_length=130),
    Case("dropout_causal_grouped", options=CAUSAL | {"dropout_p": 0.5}, heads=4, query_length=110, key_length=110),
    Case(
        "everything",
        heads=4,
        query_length=130,
        key_length=150,
        draw=everything,
        options=CAUSAL | {"window_left": 100, "softcap": 5.0, "dropout_p": 0.2, "scale": 0.4},
    ),
]
CASE_BY_NAME = {case.name: case for case in CASES}


def small(case: Case) -> Case:
    """The same call at a size that numerical differentiation can afford."""
    lengths = (4, 2) if case.query_length > case.key_length else (3, 4)  # empty rows stay empty
    sizes = {"query_length": min(case.query_length, lengths[0]), "key_length": min(case.key_length, lengths[1])}
    sizes |= {"head_dim": min(case.head_dim, 2), "value_dim": min(case.value_dim, 1), "batch": min(case.batch, 2)}
    options = dict(case.options)
    if "window_left" in options:
        options["window_left"] = 2
    if "window_right" in options:
        options["window_right"] = min(options["window_right"], 1)
    return Case(**{**case.__dict__, **sizes, "options": options})
