"""Bad input gets one clear sentence that names the argument, what it was, and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_attn


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


Q, K = x(2, 4, 5, 8), x(2, 4, 7, 8)
BAD_CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("one_dimension", (x(8), K, K), {}, "query"),
    ("integer_query", (Q.long(), K.long(), K.long()), {}, "query.*(Long|int64)"),
    ("key_dtype", (Q, K.double(), K), {}, "key"),
    ("value_dtype", (Q, K, K.half()), {}, "value"),
    ("key_head_dim", (Q, x(2, 4, 7, 6), K), {}, "key.*6|head"),
    ("value_length", (Q, K, x(2, 4, 6, 8)), {}, "value.*6"),
    ("batch", (Q, x(3, 4, 7, 8), x(3, 4, 7, 8)), {}, "batch|broadcast"),
    ("heads", (Q, x(2, 2, 7, 8), x(2, 2, 7, 8)), {}, "enable_gqa"),
    ("heads_not_a_multiple", (Q, x(2, 3, 7, 8), x(2, 3, 7, 8)), {"enable_gqa": True}, "multiple"),
    ("mask_shape", (Q, K, K), {"attn_mask": x(3, 7)}, "attn_mask.*3, 7"),
    ("mask_dtype", (Q, K, K), {"attn_mask": torch.ones(5, 7, dtype=torch.long)}, "attn_mask"),
    ("dropout_negative", (Q, K, K), {"dropout_p": -0.1}, "dropout_p.*-0.1"),
    ("dropout_above_one", (Q, K, K), {"dropout_p": 1.5}, "dropout_p.*1.5"),
    ("window_left", (Q, K, K), {"window_left": -1}, "window_left.*-1"),
    ("window_right", (Q, K, K), {"window_right": -2}, "window_right.*-2"),
    ("alignment", (Q, K, K), {"causal_alignment": "left"}, "causal_alignment.*left"),
    ("softcap", (Q, K, K), {"softcap": -1.0}, "softcap.*-1"),
    ("alibi_shape", (Q, K, K), {"alibi_slopes": x(3)}, "alibi_slopes.*3"),
    ("sinks_shape", (Q, K, K), {"sinks": x(3)}, "sinks.*3"),
    ("key_lengths_shape", (Q, K, K), {"key_lengths": torch.tensor([1, 2, 3])}, "key_lengths.*3"),
    ("key_lengths_dtype", (Q, K, K), {"key_lengths": x(2)}, "key_lengths"),
    ("key_lengths_range", (Q, K, K), {"key_lengths": torch.tensor([3, 8])}, "key_lengths.*8"),
    ("key_lengths_negative", (Q, K, K), {"key_lengths": torch.tensor([-1, 3])}, "key_lengths.*-1"),
    ("device", (Q, K.to("meta"), K), {}, "device|meta"),
]


@pytest.mark.parametrize(("args", "options", "message"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_the_error_names_the_argument(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"(?s){message}"):
        torch_attn.attention(*args, **options)


def test_raw_operator_wants_four_dimensions() -> None:
    with pytest.raises((RuntimeError, ValueError), match="query.*4"):
        torch.ops.torch_attn.attention_forward(x(5, 8), x(5, 8), x(5, 8))


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError), match="avx3.*(baseline|avx2)"):
        torch.ops.torch_attn.force_cpu_isa("avx3")
