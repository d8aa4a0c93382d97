"""The CUDA kernels of attention maps, emulated, equal the float64 map and its autograd gradients, with every option.

Each test draws its thread schedule as it draws its inputs; the emulator also checks every access for races and bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_attn import reference

from ..cases import CASE_BY_NAME, CAUSAL, Case, everything, float_mask
from ..map_oracle import (
    ASKED,
    DTYPES,
    MAP_CASES,
    STATISTICS,
    Results,
    Rounding,
    assert_keys_hold_the_largest_weights,
    assert_within_precision,
    draw,
    dtype_name,
    exact_statistics,
    exact_weights,
    in_float64,
    rounding_of_tensor_cores,
    statistics_cotangents,
    weights_cotangent,
)
from .emulation import Device, Fault, KernelError
from .maps import MapRun
from .test_kernels import needs_access_reports, random_seed


@dataclass(frozen=True)
class Kind:
    """Kernels of a tier, for a dtype; sm80's products of float32 are of TF32."""

    tier: str
    dtype: torch.dtype

    @property
    def tf32(self) -> bool:
        return self.tier == "sm80" and self.dtype == torch.float32

    def rounded(self) -> Rounding | None:
        """How the operands of their products are rounded."""
        return rounding_of_tensor_cores(self.dtype) if self.tier == "sm80" else None

    def run(
        self, device: Device, query: Tensor, key: Tensor, options: dict[str, Any], rows: Tensor | None = None
    ) -> MapRun:
        device.configure(random_seed())
        device.force_tier(self.tier)
        return MapRun(device, query, key, options, rows, allow_tf32=self.tf32)

    def __str__(self) -> str:
        return f"{self.tier}-{'tf32' if self.tf32 else dtype_name(self.dtype)}"


EXACT = Kind("simt", torch.float64)
SIMT = [Kind("simt", dtype) for dtype in DTYPES if dtype != torch.float64]
SM80 = [Kind("sm80", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
LOW = [*SIMT, *SM80]


def check_statistics(device: Device, case: Case, kind: Kind, names: tuple[str, ...] = STATISTICS) -> None:
    """names: the statistics whose gradients are passed back, all at once."""
    query, key, options = draw(case, kind.dtype)
    run = kind.run(device, query, key, options)
    gradients = statistics_cotangents(query, key, names)
    actual = {n: x.clone() for n, x in run.statistics(**ASKED).items()}
    if names:
        actual |= run.statistics_backward(gradients)
    given = (query, key, options, gradients)
    assert_within_precision(actual, exact_statistics, kind.dtype, *given, rounded=kind.rounded())
    if case.name != "extreme_mask_rows" or kind == EXACT:  # where float32 rounds all scores to one
        weights = reference.attention_weights(*in_float64(query, key), **options)
        assert_keys_hold_the_largest_weights(actual, weights, 1e-2 if kind.tf32 else 1e-4)


def smooth(case: Case, kind: Kind) -> tuple[str, ...]:
    """Statistics whose gradients can be compared: in low precision two keys may change places at the top, and torch's
    derivative of a logsumexp of −1e9 is wrong."""
    unstable = ("max_weight", "top_weights") if kind != EXACT else ()
    wrong = ("logsumexp",) if case.name == "extreme_mask_rows" else ()
    return tuple(n for n in STATISTICS if n not in unstable + wrong)


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_statistics_and_gradients_equal_float64_autograd(case: Case, device: Device) -> None:
    check_statistics(device, case, EXACT, smooth(case, EXACT))


EVERY_DTYPE = ["causal_long", "grouped_query", "float_mask_over_heads", "everything"]


@pytest.mark.parametrize("kind", LOW, ids=str)
@pytest.mark.parametrize("name", EVERY_DTYPE)
def test_statistics_of_every_dtype(name: str, kind: Kind, device: Device) -> None:
    check_statistics(device, CASE_BY_NAME[name], kind, smooth(CASE_BY_NAME[name], kind))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("odd_dims", "extreme_mask_rows") for k in LOW if n != "odd_dims" or k in SIMT],
    ids=str,
)
def test_statistics_survive_odd_sizes_and_a_large_logsumexp(name: str, kind: Kind, device: Device) -> None:
    check_statistics(device, CASE_BY_NAME[name], kind, ())


# Each option and broadcast once on tensor cores, and each number of chunks of 64 columns.
SM80_CASES = [
    *("window", "causal_bottom_right", "window_left_of_all_keys", "heads_inside", "grouped_query_causal", "softcap"),
    *("bool_mask_empty_rows", "key_padding_mask", "float_mask", "float_mask_key_major", "float_mask_over_rows"),
    *("float_mask_over_keys", "float_mask_scalar", "key_lengths_bottom_right", "alibi_bottom_right", "sinks"),
    *("negative_scale", "one_row_one_key"),
]
ONE_HEAD = {"batch": 1, "heads": 1, "kv_heads": 1}
SM80_WIDTHS = [
    Case("dim_8", head_dim=8, **ONE_HEAD),
    Case("dim_72_grouped", batch=1, kv_heads=1, head_dim=72, query_length=130, key_length=140),
    Case("dim_128_causal", head_dim=128, query_length=70, key_length=100, options=CAUSAL, **ONE_HEAD),
    Case("dim_248_everything", head_dim=248, draw=everything, query_length=70, key_length=80, **ONE_HEAD),
]


@pytest.mark.parametrize("case", [*(CASE_BY_NAME[n] for n in SM80_CASES), *SM80_WIDTHS], ids=str)
def test_tensor_cores_serve_every_option_and_width(case: Case, device: Device) -> None:
    kind = Kind("sm80", torch.bfloat16)
    check_statistics(device, case, kind, smooth(case, kind))
    check_weights(device, case, kind, mean=False)


@pytest.mark.parametrize("name", STATISTICS)
def test_each_gradient_alone_equals_float64_autograd(name: str, device: Device) -> None:
    check_statistics(device, CASE_BY_NAME["everything"], EXACT, (name,))


@pytest.mark.parametrize("kind", [Kind("simt", torch.float32), Kind("sm80", torch.float16)], ids=str)
def test_gradients_reach_chosen_keys(kind: Kind, device: Device) -> None:
    """Scores apart enough that no precision changes the order of the largest."""
    query, key = torch.randn(1, 2, 70, 16).to(kind.dtype), torch.randn(1, 2, 90, 16)
    key = (key * torch.linspace(0.2, 3, 90)[:, None]).to(kind.dtype)
    run = kind.run(device, query, key, {})
    gradients = statistics_cotangents(query, key, ("max_weight", "top_weights"))
    found = run.statistics(**ASKED)
    exact = exact_statistics(query.double(), key.double(), {}, {})
    same = (found["top_indices"] == exact["top_indices"]).all(-1)
    assert same.float().mean() > 0.9
    gradients = {n: g * (same if g.dim() == 3 else same[..., None]) for n, g in gradients.items()}
    actual = run.statistics_backward(gradients)
    assert_within_precision(actual, exact_statistics, kind.dtype, query, key, {}, gradients, rounded=kind.rounded())


def check_weights(
    device: Device, case: Case, kind: Kind, mean: bool, rows: Tensor | None = None, backward: bool = True
) -> None:
    query, key, options = draw(case, kind.dtype)
    part = ({"heads": "mean"} if mean else {}) | ({} if rows is None else {"queries": rows})
    given = weights_cotangent(query, key, part) if backward else {}
    run = kind.run(device, query, key, options, rows)
    actual: Results = {"weights": run.weights(mean)}
    if backward:
        actual |= run.weights_backward(given["weights"], mean)
    if rows is not None:  # what the ops layer gathered passes its gradient back
        for name, length in (("grad_query", query.size(2)), ("grad_attn_mask", case.query_length)):
            if name in actual and actual[name].size(2) == len(rows):
                whole = torch.zeros(*actual[name].shape[:2], length, actual[name].size(3), dtype=actual[name].dtype)
                actual[name] = whole.index_add(2, rows, actual[name])
    call = (query, key, options, given)
    assert_within_precision(actual, exact_weights(part), kind.dtype, *call, rounded=kind.rounded())


@pytest.mark.parametrize("case", MAP_CASES, ids=str)
def test_weights_and_gradients_equal_float64_autograd(case: Case, device: Device) -> None:
    check_weights(device, case, EXACT, mean=False)


@pytest.mark.parametrize("kind", LOW, ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["all", "mean"])
@pytest.mark.parametrize("name", EVERY_DTYPE)
def test_weights_of_every_dtype(name: str, mean: bool, kind: Kind, device: Device) -> None:
    check_weights(device, CASE_BY_NAME[name], kind, mean)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in ("odd_dims", "extreme_mask_rows") for k in LOW if n != "odd_dims" or k in SIMT],
    ids=str,
)
def test_weights_survive_odd_sizes_and_a_large_logsumexp(name: str, kind: Kind, device: Device) -> None:
    check_weights(device, CASE_BY_NAME[name], kind, mean=False, backward=False)


@pytest.mark.parametrize("mean", [False, True], ids=["all", "mean"])
def test_whole_pieces_of_a_map_are_stored_at_once_or_not(mean: bool, device: Device) -> None:
    """Rows of a map that are multiples of 16 bytes and rows that are not."""
    for keys in (96, 100, 101):
        case = Case("weights", batch=1, heads=2, query_length=70, key_length=keys, options=CAUSAL)
        check_weights(device, case, Kind("sm80", torch.float16), mean, backward=False)


ANY_ROWS = ["plain", "causal_long", "causal_bottom_right", "window", "grouped_query", "float_mask", "everything"]


@pytest.mark.parametrize("kind", [EXACT, Kind("sm80", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("mean", [False, True], ids=["all", "mean"])
@pytest.mark.parametrize("name", ANY_ROWS)
def test_rows_in_any_order(name: str, mean: bool, kind: Kind, device: Device) -> None:
    """With rows that come twice, and more than one tile of them."""
    case = CASE_BY_NAME[name]
    rows = torch.randint(0, case.query_length, (77,))
    check_weights(device, case, kind, mean, rows)


WIDE = [
    Case("wider_than_a_block", batch=1, heads=1, kv_heads=1, head_dim=150),
    Case("head_dim_zero", head_dim=0, options={"scale": 1.0}),
    Case("several_tiles", batch=1, heads=2, kv_heads=1, query_length=130, key_length=150, options=CAUSAL),
]


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_any_size(case: Case, device: Device) -> None:
    check_statistics(device, case, EXACT)
    check_weights(device, case, EXACT, mean=False)


BOTH = pytest.mark.parametrize("kind", [Kind("simt", torch.float32), Kind("sm80", torch.float16)], ids=str)


@BOTH
def test_no_keys(kind: Kind, device: Device) -> None:
    query, key, options = draw(Case("no_keys", key_length=0, options=CAUSAL), kind.dtype)
    found = kind.run(device, query, key, options).statistics(**ASKED)
    assert (found["logsumexp"] == -math.inf).all()
    assert (found["argmax"] == -1).all() and (found["top_indices"] == -1).all()
    for name in STATISTICS[1:]:
        assert (found[name] == 0).all(), name


@pytest.mark.parametrize("kind", [EXACT, Kind("sm80", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("top_k", [1, 17, 64, 200])
def test_top_k_is_torchs(top_k: int, kind: Kind, device: Device) -> None:
    # Numbers whose products and sums are exact in every type.
    query, key = (torch.randint(-8, 9, (1, 2, n, 8)).to(kind.dtype) for n in (70, 150))
    found = kind.run(device, query, key, {"scale": 1 / 16}).statistics(top_k=top_k, column_sum=False)
    count = min(top_k, 150)
    weights = reference.attention_weights(*in_float64(query, key), scale=1 / 16)
    values, indices = weights.sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found["top_weights"][..., :count], values[..., :count].to(found["top_weights"].dtype))
    assert torch.equal(found["top_indices"][..., :count], indices[..., :count])
    assert (found["top_indices"][..., count:] == -1).all() and (found["top_weights"][..., count:] == 0).all()


@BOTH
def test_equal_scores_are_ranked_by_their_keys_number(kind: Kind, device: Device) -> None:
    query, key = torch.ones(1, 1, 70, 8, dtype=kind.dtype), torch.zeros(1, 1, 300, 8, dtype=kind.dtype)
    key[:, :, [7, 130, 201, 202]] = 1.0
    found = kind.run(device, query, key, {}).statistics(top_k=6)
    assert (found["argmax"] == 7).all()
    assert (found["top_indices"] == torch.tensor([7, 130, 201, 202, 0, 1])).all()


@BOTH
def test_results_do_not_depend_on_the_schedule(kind: Kind, device: Device) -> None:
    query, key, options = draw(CASE_BY_NAME["everything"], kind.dtype)
    gradients = statistics_cotangents(query, key, STATISTICS)
    first: Results = {}
    for _ in range(2):
        run = kind.run(device, query, key, options)
        found = {n: x.clone() for n, x in run.statistics(**ASKED).items()} | run.statistics_backward(gradients)
        first = first or found
        assert all(torch.equal(x, found[n]) for n, x in first.items())


def test_each_tier_serves_or_says_why_not(device: Device) -> None:
    def sm80(dtype: torch.dtype, allow_tf32: bool = False, **sizes: Any) -> str:
        query, key, options = draw(Case("call", **sizes), dtype)
        tiers = MapRun(device, query, key, options, allow_tf32=allow_tf32).answers(None)
        assert tiers["simt"] == "+any type and size"
        return tiers["sm80"]

    assert sm80(torch.float16) == sm80(torch.float32, True) == "+on tensor cores"
    assert sm80(torch.float64) == "it takes float16, bfloat16 and float32"
    assert "allow_tf32 does not allow" in sm80(torch.float32)
    assert sm80(torch.bfloat16, head_dim=20) == "head_dim must be a multiple of 8"
    assert sm80(torch.bfloat16, head_dim=264) == "head_dim must be at most 256"
    assert sm80(torch.float32, True, head_dim=132) == "head_dim must be at most 128"
    shifted = torch.randn(2, 2, 37, 20).half()[..., 4:]
    assert "multiples of 16 bytes" in MapRun(device, shifted, shifted, {}).answers(None)["sm80"]
    device.force_tier("sm80")
    with pytest.raises(KernelError, match="no CUDA kernel can serve this call .*sm80: it takes float16"):
        MapRun(device, shifted.double(), shifted.double(), {}).statistics()


def weights_of(run: MapRun) -> object:
    return run.weights(mean=True)


def row_terms_and_gradients(run: MapRun) -> object:
    run.logsumexp = torch.zeros(run.sizes)
    return run.weights_backward(torch.randn(*run.sizes, run.problem.key_length).to(run.call.query.dtype), mean=False)


@needs_access_reports
@pytest.mark.parametrize("kernels", [MapRun.statistics, weights_of, row_terms_and_gradients])
def test_the_loss_of_any_barrier_or_wait_is_noticed(kernels: Callable[[MapRun], object], device: Device) -> None:
    """In each kernel's first steps on tensor cores."""
    sizes = {"batch": 1, "heads": 2, "query_length": 140, "key_length": 200}
    query, key, options = draw(Case("several_steps", **sizes, draw=float_mask("H", "L", "S")), torch.float16)
    run = Kind("sm80", torch.float16).run(device, query, key, options)
    for fault, calls in ((Fault.SKIP_BLOCK_BARRIER, 4), (Fault.SKIP_COPY_WAIT, 2)):
        for call in range(calls):
            device.configure(random_seed(), fault, call)
            with pytest.raises(KernelError):
                kernels(run)
