"""float32 and float16 as sums of bfloat16 numbers (csrc/cpu/bfloat16/pieces.h): as exact as products of float32, also
at the ends of its range, and by themselves only where calls are long enough."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_attn

pytestmark = pytest.mark.skipif("amx" not in torch.ops.torch_attn.cpu_isas(), reason="this CPU has no AMX")


def gradients(attention, inputs: tuple[Tensor, ...], grad: Tensor, **options: object) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))


def root_mean_square(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# One block of rows and several, columns that fill tiles and that do not; long enough to take AMX unforced. float16's
# error is that of rounding the results, on both sides.
SHAPES = [(300, 300, 64, 64), (1100, 200, 64, 64), (160, 600, 96, 96), (190, 170, 100, 100)]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, factor", [(torch.float32, 1.5), (torch.float16, 1.02)])
def test_error_is_not_above_that_of_torchs_kernel(
    dtype: torch.dtype, factor: float, shape: tuple[int, int, int, int], is_causal: bool
) -> None:
    rows, keys, head_dim, value_dim = shape
    sizes = ((rows, head_dim), (keys, head_dim), (keys, value_dim))
    inputs = tuple(torch.randn(1, 2, *size).to(dtype) for size in sizes)
    grad = torch.randn(1, 2, rows, value_dim).to(dtype)
    exact = gradients(
        F.scaled_dot_product_attention, tuple(x.double() for x in inputs), grad.double(), is_causal=is_causal
    )
    ours = gradients(torch_attn.attention, inputs, grad, is_causal=is_causal)
    torchs = gradients(F.scaled_dot_product_attention, inputs, grad, is_causal=is_causal)
    for name, x, y, z in zip(("out", "query", "key", "value"), ours, torchs, exact, strict=True):
        error, allowed = root_mean_square(x.double() - z), factor * root_mean_square(y.double() - z)
        assert error <= allowed, f"{name}: {error:.2e} is more than {allowed:.2e}"


def test_float32_keeps_all_of_its_24_bits() -> None:
    """One key: the output is its value, which three pieces of 8 bits make up exactly."""
    query, key = torch.randn(1, 1, 160, 64), torch.randn(1, 1, 1, 64)
    value = torch.randn(1, 1, 1, 64) * 10.0 ** torch.randint(-25, 38, (64,))
    key, value = key.expand(-1, -1, 160, -1), value.expand(-1, -1, 160, -1)
    only_first = torch.zeros(160, 160, dtype=torch.bool)
    only_first[:, 0] = True
    out = torch_attn.attention(query, key.contiguous(), value.contiguous(), attn_mask=only_first)
    assert torch.equal(out, value[:, :, :1].expand_as(out))


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38])
def test_ends_of_the_range_reach_the_output_as_they_are(number: float) -> None:
    query, key, value = (torch.randn(1, 1, 200, 64) for _ in range(3))
    value[0, 0, 7, 5] = number
    out = torch_attn.attention(query, key, value, is_causal=True)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert out[..., 7:, 5].isnan().all() if number != number else True
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_an_infinite_key_is_not_attended_where_its_score_is_minus_infinity() -> None:
    query, key, value = (torch.rand(1, 1, 200, 64) + 0.1 for _ in range(3))
    key[0, 0, 3, 9] = -torch.inf
    out = torch_attn.attention(query, key, value)
    kept = [i for i in range(200) if i != 3]
    torch.testing.assert_close(out, torch_attn.attention(query, key[:, :, kept], value[:, :, kept]))


# Rows that share a tile with their second pieces, that do not, and two tiles of them; a block of keys and parts of one.
@pytest.mark.parametrize("heads, rows, keys", [(1, 6, 1200), (4, 4, 700), (2, 12, 1024)])
def test_decoding_in_pieces_errs_no_more_than_torchs_kernel(heads: int, rows: int, keys: int) -> None:
    query = torch.randn(1, 2 * heads, rows, 64).half()
    key, value = (torch.randn(1, 2, keys, 64).half() for _ in range(2))
    whole = [x.repeat_interleave(heads, 1) for x in (key, value)]
    exact = F.scaled_dot_product_attention(query.double(), *(x.double() for x in whole))
    ours, torchs = (
        root_mean_square(out.double() - exact)
        for out in (
            torch_attn.attention(query, key, value, enable_gqa=True),
            F.scaled_dot_product_attention(query, *whole),
        )
    )
    assert ours <= 1.02 * torchs


@pytest.mark.parametrize("place", ["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_decoding_in_pieces_leaves_infinite_numbers_to_vectors(number: float, place: str) -> None:
    inputs = {name: torch.randn(1, 2, rows, 64).half() for name, rows in (("query", 8), ("key", 1100), ("value", 1100))}
    inputs[place][0, 0, 3, 9] = number
    outs = {}
    for isa in ("avx512", "amx"):
        torch.ops.torch_attn.force_cpu_isa(isa)
        try:
            outs[isa] = torch_attn.attention(*inputs.values())
        finally:
            torch.ops.torch_attn.force_cpu_isa("")
    torch.testing.assert_close(outs["amx"], outs["avx512"], rtol=0, atol=0, equal_nan=True)


def test_short_calls_are_left_to_vectors_unless_amx_is_forced() -> None:
    """Sums in another order, whose last bits differ, tell which kernel ran."""
    ops = torch.ops.torch_attn

    def run(isa: str, inputs: tuple[Tensor, ...]) -> Tensor:
        ops.force_cpu_isa(isa)
        try:
            return torch_attn.attention(*inputs)
        finally:
            ops.force_cpu_isa("")

    for length, by_tiles in ((48, False), (400, True)):
        inputs = tuple(torch.randn(2, 4, length, 64) for _ in range(3))
        chosen, vectors, tiles = run("", inputs), run("avx512", inputs), run("amx", inputs)
        assert not torch.equal(vectors, tiles)
        assert torch.equal(chosen, tiles if by_tiles else vectors)
