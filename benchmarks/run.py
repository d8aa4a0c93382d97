"""Runs one case: ours and PyTorch's in turn, with accuracy beside speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .cases import Case, ours, torchs
from .measure import interleave

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Result:
    """One row of the table. Errors are the largest absolute ones against float64; for gradients, the worst of three."""

    case: str
    group: str
    dtype: str
    mode: str
    threads: int
    speedup: float
    speedup_low: float
    speedup_high: float
    gflops: float
    share_of_peak: float
    share_of_bandwidth: float | None
    error_ours: float | None
    error_torch: float | None
    rounds: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def forward_and_backward(attention: Attention, inputs: list[Tensor], grad: Tensor, options: dict) -> list[Tensor]:
    out = attention(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def as_call(attention: Attention, inputs: list[Tensor], grad: Tensor, options: dict, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def call() -> object:
            with torch.no_grad():
                return attention(*inputs, **options)

        return call
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: forward_and_backward(attention, leaves, grad, options)


def worst_error(attention: Attention, inputs: list[Tensor], grad: Tensor, options: dict, mode: str) -> float:
    """Against torch's float64 answer on the same (rounded) inputs."""

    def results(function: Attention, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        cast = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in options.items()}
        values = forward_and_backward(function, leaves, grad.to(dtype), cast)
        return values[:1] if mode == "forward" else values

    exact = results(torchs, torch.float64)
    actual = results(attention, inputs[0].dtype)
    return max((a.double() - e).abs().max().item() for a, e in zip(actual, exact, strict=True))


def run_case(
    case: Case, dtype: torch.dtype, mode: str, seconds: float, peak: float, bandwidth: float, with_accuracy: bool
) -> Result:
    torch.manual_seed(0)
    inputs = list(case.inputs(dtype))
    grad = torch.randn(case.batch, case.heads, case.query_length, case.head_dim).to(dtype)
    options = case.kwargs(dtype)
    timing = interleave([as_call(f, inputs, grad, options, mode) for f in (ours, torchs)], seconds)
    middle, low, high = timing.speedup()
    flops = case.flops(mode) / timing.best(0)
    cache_bytes = sum(x.numel() * x.element_size() for x in inputs[1:])
    comparable = with_accuracy and "dropout_p" not in options
    return Result(
        case=case.name,
        group=case.group,
        dtype=str(dtype).removeprefix("torch."),
        mode=mode,
        threads=torch.get_num_threads(),
        speedup=middle,
        speedup_low=low,
        speedup_high=high,
        gflops=flops / 1e9,
        share_of_peak=flops / peak,
        share_of_bandwidth=cache_bytes / timing.best(0) / bandwidth if case.group == "decode" else None,
        error_ours=worst_error(ours, inputs, grad, options, mode) if comparable else None,
        error_torch=worst_error(torchs, inputs, grad, options, mode) if comparable else None,
        rounds=len(timing.rounds),
    )
