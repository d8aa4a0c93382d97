"""How the tests of attention maps judge a result: against the reference in float64, with the reference in the kernels'
own accumulator type as the yardstick of what its precision allows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_attn import reference

from .cases import CASES, Case
from .oracle import DIFFERENTIABLE_OPTIONS, RoundedProducts, largest, max_error, rounded_to_tf32

MAP_CASES = [case for case in CASES if case.name not in ("dropout", "dropout_causal_grouped")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Results = dict[str, Tensor]
Rounding = Callable[[Tensor], Tensor]
ASKED: dict[str, Any] = {"top_k": 3, "mass_window": 5}
STATISTICS = (
    "logsumexp",
    "entropy",
    "max_weight",
    "mean_distance",
    "window_mass",
    "top_weights",
    "column_sum",
)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding_of_tensor_cores(dtype: torch.dtype) -> Rounding:
    """How tensor cores round the operands of products that come in the dtype, float32 to TF32."""
    return rounded_to_tf32 if dtype == torch.float32 else lambda x: x.to(dtype).float()


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Query, key and the options of a case, without dropout, which is no part of a map."""
    query, key, _ = case.tensors(dtype)
    options = case.kwargs(dtype)
    options.pop("dropout_p", None)
    return query, key, options


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def leaves_of(query: Tensor, key: Tensor, options: dict[str, Any]) -> Results:
    named = {"query": query, "key": key}
    for name in DIFFERENTIABLE_OPTIONS:
        x = options.get(name)
        if x is not None and x.is_floating_point():
            named[name] = x
    return named


def with_gradients(
    function: Callable[..., Results], query: Tensor, key: Tensor, options: dict[str, Any], cotangents: Results
) -> Results:
    """What the function returns, and the gradients of its results' products with the cotangents."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in leaves_of(query, key, options).items()}
    given = options | {n: x for n, x in leaves.items() if n in DIFFERENTIABLE_OPTIONS}
    results = function(leaves["query"], leaves["key"], **given)
    loss = query.new_zeros((), dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    for name, cotangent in cotangents.items():
        value = results[name]
        if name == "logsumexp":  # a row with nothing to attend has logsumexp −inf and no gradient from it
            value = value.masked_fill(~value.isfinite(), 0.0)
        loss = loss + (value * cotangent.to(value.dtype)).sum()
    gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if cotangents and loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {n: x.detach() for n, x in results.items()} | found


def assert_within_precision(
    actual: Results,
    reference: Callable[..., Results],
    dtype: torch.dtype,
    *call: Any,
    factor: float = 4,
    rounded: Rounding | None = None,
) -> Results:
    """Every number is as near to float64 as ``factor`` times the reference in the accumulator type is, and a few units
    in the last place of the largest number more; what is returned in 16 bits may be rounded to these. ``rounded``: how
    matrix instructions round the operands of their products, which the yardstick then does, too. Returns float64's
    answer."""
    accumulator = accumulator_of(dtype)

    def in_type(to: torch.dtype) -> Results:
        return reference(*(cast_all(x, to) for x in call))

    exact = in_type(torch.float64)
    with RoundedProducts(rounded) if rounded else contextlib.nullcontext():
        yardstick = in_type(accumulator)
    for name, value in actual.items():
        if not value.is_floating_point():
            continue
        units = 64 * torch.finfo(accumulator).eps
        if name.startswith("grad"):  # sums over rows, of which a slope's have distances as factors
            rows = math.sqrt(max(1.0, call[0].numel() / max(1, value.numel())))
            units *= rows * (call[1].size(2) if name == "grad_alibi_slopes" else 1)
        if value.dtype != accumulator:
            units += torch.finfo(value.dtype).eps
        bound = factor * max_error(yardstick[name].double(), exact[name]) + units * max(1.0, largest(exact[name]))
        error = max_error(value, exact[name])
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"
    return exact


def cast_all(x: Any, dtype: torch.dtype) -> Any:
    return {n: cast(v, dtype) for n, v in x.items()} if isinstance(x, dict) else cast(x, dtype)


def exact_statistics(query: Tensor, key: Tensor, options: dict[str, Any], cotangents: Results) -> Results:
    def function(*args: Tensor, **kwargs: Any) -> Results:
        found = reference.attention_statistics(*args, **kwargs, **ASKED)
        return {n: x for n, x in found.items() if x is not None}

    return with_gradients(function, query, key, options, cotangents)


def statistics_cotangents(query: Tensor, key: Tensor, names: tuple[str, ...]) -> Results:
    rows = query.shape[:3]
    shapes = {"top_weights": (*rows, ASKED["top_k"]), "column_sum": (*rows[:2], key.size(2))}
    drawn = {n: torch.randn(shapes.get(n, rows), dtype=accumulator_of(query.dtype)) for n in names}
    if "mean_distance" in drawn:  # whose derivatives are as large as the distances
        drawn["mean_distance"] /= query.size(2) + key.size(2)
    return drawn


def in_float64(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


def assert_keys_hold_the_largest_weights(actual: Results, weights: Tensor, bound: float = 1e-4) -> None:
    """Of scores that rounding makes equal either may come first: the chosen keys' weights decide, not their numbers."""
    attended = (weights > 0).sum(-1)
    assert torch.equal(actual["argmax"] < 0, attended == 0)
    indices = actual["top_indices"]
    assert torch.equal((indices >= 0).sum(-1), attended.clamp(max=ASKED["top_k"]))
    padded = torch.nn.functional.pad(weights, (0, 1))
    at = padded.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0.0)
    assert (at - actual["top_weights"].double()).abs().max() < bound
    assert torch.equal(indices[..., 0], actual["argmax"])
    assert torch.equal(actual["top_weights"][..., 0], actual["max_weight"])
    distinct = indices.sort(-1).values
    assert ((distinct[..., 1:] != distinct[..., :-1]) | (distinct[..., 1:] < 0)).all()


def exact_weights(part: dict[str, Any]) -> Callable[..., Results]:
    def function(query: Tensor, key: Tensor, options: dict[str, Any], cotangents: Results) -> Results:
        def weights(*args: Tensor, **kwargs: Any) -> Results:
            return {"weights": reference.attention_weights(*args, **kwargs, **part)}

        return with_gradients(weights, query, key, options, cotangents)

    return function


def weights_cotangent(query: Tensor, key: Tensor, part: dict[str, Any]) -> Results:
    shape = reference.attention_weights(query.double(), key.double(), scale=1.0, **part).shape
    return {"weights": torch.randn(shape).to(query.dtype)}
