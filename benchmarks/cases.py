"""What is timed: one list of cases, each a pair of calls (ours, PyTorch's) on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_attn

# What is computed, and its matrix products as a multiple of forward's two: backward has 5, and the tangent of a product
# is two more. Double backward is forward, backward, forward mode of the one and of the other.
MODES = {"forward": 1.0, "forward+backward": 3.5, "jvp": 3.0, "double backward": 12.5}


@dataclass(frozen=True)
class Case:
    """One attention shape with its options; ``draw`` makes the options that are tensors."""

    name: str
    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    kv_heads: int = 0  # 0: as many as heads
    options: dict[str, Any] = field(default_factory=dict)
    draw: Callable[[Case, torch.dtype], dict[str, Any]] | None = None
    group: str = "shapes"
    forward_only: bool = False
    plain: str = ""  # the case without the option, in turn with which its cost is measured

    def visible_share(self) -> float:
        """The share of the (L, S) scores that are computed by a kernel that skips what is masked by position."""
        if "window_left" in self.options:
            rows = torch.arange(self.query_length)
            return float(torch.minimum(rows, torch.tensor(self.options["window_left"])).add(1).sum()) / (
                self.query_length * self.key_length
            )
        return 0.5 if self.options.get("is_causal") else 1.0

    def touched_share(self, block: int = 32) -> float:
        """The same in whole blocks of rows and keys: those with a score that counts."""
        if not self.options.get("is_causal"):
            return 1.0
        left = self.options.get("window_left", self.query_length)
        rows = torch.arange(0, self.query_length, block)
        first = (rows - left).clamp(min=0) // block
        last = (rows + block - 1).clamp(max=self.key_length - 1) // block
        blocks = -(-self.query_length // block) * -(-self.key_length // block)
        return float((last - first + 1).sum()) / blocks

    def touched_scores(self) -> float:
        return self.batch * self.heads * self.query_length * self.key_length * self.touched_share()

    def plain_case(self) -> Case | None:
        return next(case for case in CASES if case.name == self.plain) if self.plain else None

    def flops(self, mode: str) -> float:
        """Multiply-adds count two."""
        products = 4 * self.batch * self.heads * self.query_length * self.key_length * self.head_dim
        return products * self.visible_share() * MODES[mode]

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = self.kv_heads or self.heads

        def make(heads: int, length: int) -> Tensor:
            return torch.randn(self.batch, heads, length, self.head_dim).to(dtype)

        return (
            make(self.heads, self.query_length),
            make(kv_heads, self.key_length),
            make(kv_heads, self.key_length),
        )

    def kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        drawn = self.draw(self, dtype) if self.draw else {}
        return {**self.options, **drawn, **({"enable_gqa": True} if self.kv_heads else {})}


def ours(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return torch_attn.attention(query, key, value, **options)


def torchs(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA; a window, which it lacks, becomes the boolean mask a user would write."""
    if "window_left" in options:
        left = options.pop("window_left")
        options.pop("is_causal", None)
        rows = torch.arange(query.size(-2), device=query.device)[:, None]
        keys = torch.arange(key.size(-2), device=query.device)
        options["attn_mask"] = (keys <= rows) & (keys >= rows - left)
    return F.scaled_dot_product_attention(query, key, value, **options)


def torchs_math(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA's path of ordinary operations, the only one that forward mode and second derivatives have."""
    with sdpa_kernel(SDPBackend.MATH):
        return torchs(query, key, value, **options)


def key_padding(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    lengths = torch.linspace(case.key_length // 2, case.key_length, case.batch).long()
    return {"attn_mask": (torch.arange(case.key_length) < lengths[:, None])[:, None, None]}


def bool_mask(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"attn_mask": torch.rand(case.query_length, case.key_length) > 0.1}


def causal_as_mask(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"attn_mask": torch.ones(case.query_length, case.key_length, dtype=torch.bool).tril()}


def shared_float_mask(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"attn_mask": torch.randn(case.query_length, case.key_length).to(dtype)}


def float_mask(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {"attn_mask": torch.randn(1, case.heads, case.query_length, case.key_length).to(dtype)}


def with_causal(*cases: Case) -> list[Case]:
    causal = [
        Case(**{**c.__dict__, "name": f"{c.name} causal", "options": {**c.options, "is_causal": True}}) for c in cases
    ]
    return [c for pair in zip(cases, causal, strict=True) for c in pair]


def with_option(option: str, plain: str, *shape: int, **rest: Any) -> Case:
    """The case called ``plain`` with an option of the group "masks"."""
    return Case(f"{option} {plain}", *shape, group="masks", plain=plain, **rest)


CASES = [
    *with_causal(
        Case("B1 H8 L16 D64", 1, 8, 16, 16, 64, group="small"),
        Case("B1 H8 L512 D64", 1, 8, 512, 512, 64),
        Case("B2 H8 L1024 D64", 2, 8, 1024, 1024, 64),
        Case("B1 H8 L1024 D64", 1, 8, 1024, 1024, 64, group="derivatives"),
        Case("B1 H8 L2048 D64", 1, 8, 2048, 2048, 64, group="derivatives"),
        Case("B1 H8 L4096 D64", 1, 8, 4096, 4096, 64),
        Case("B1 H8 L2048 D128", 1, 8, 2048, 2048, 128),
        Case("BERT-base B8 H12 L128 D64", 8, 12, 128, 128, 64),
        Case("ViT-B B4 H12 L197 D64", 4, 12, 197, 197, 64),
        Case("B1 H2 L8192 D64", 1, 2, 8192, 8192, 64, group="long"),
        Case("B1 H1 L16384 D64", 1, 1, 16384, 16384, 64, group="long"),
        *(Case(f"B1 H8 L1024 D{d}", 1, 8, 1024, 1024, d, group="dims") for d in (32, 80, 96, 256)),
        Case("GQA 32/8 B1 L1024 D128", 1, 32, 1024, 1024, 128, kv_heads=8, group="gqa"),
    ),
    Case("B4 H8 L1024 D64", 4, 8, 1024, 1024, 64, group="masks"),
    with_option("key padding", "B4 H8 L1024 D64", 4, 8, 1024, 1024, 64, draw=key_padding),
    *(
        with_option(option, "B1 H8 L2048 D64", 1, 8, 2048, 2048, 64, draw=draw)
        for option, draw in (
            ("bool mask", bool_mask),
            ("causal as bool mask", causal_as_mask),
            ("float mask (L, S)", shared_float_mask),
            ("float mask", float_mask),
        )
    ),
    with_option("dropout 0.1", "B1 H8 L2048 D64", 1, 8, 2048, 2048, 64, options={"dropout_p": 0.1}),
    Case(
        "window 1024 B1 H1 L16384 D64",
        1,
        1,
        16384,
        16384,
        64,
        options={"is_causal": True, "window_left": 1024},
        group="long",
        plain="B1 H1 Lq16384 Lk1056 D64",  # not all keys: reading and writing a row is spread over as many of them
    ),
    Case("B1 H1 Lq16384 Lk1056 D64", 1, 1, 16384, 1056, 64, group="long"),
    *(
        Case(f"decode B1 H32 Lq{n} Lk4096 D128", 1, 32, n, 4096, 128, group="decode", forward_only=True)
        for n in (1, 4, 8, 16)
    ),
    *(
        Case(f"decode GQA 32/8 B1 Lq{n} Lk4096 D128", 1, 32, n, 4096, 128, 8, group="decode", forward_only=True)
        for n in (1, 4)
    ),
]
