"""Runs one case: ours and PyTorch's in turn, with accuracy beside speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case, ours, torchs
from .measure import interleave

Attention = Callable[..., Tensor]

# PyTorch's implementations of SDPA. "auto": the one that it chooses.
BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class BackendRefuses(RuntimeError):
    """PyTorch's backend does not serve the case; the text says why."""


@dataclass(frozen=True)
class Result:
    """One row of the table. Errors are the largest absolute ones against float64; for gradients, the worst of three."""

    case: str
    group: str
    dtype: str
    mode: str
    threads: int
    device: str
    baseline: str  # of BACKENDS
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
    case: Case,
    dtype: torch.dtype,
    mode: str,
    seconds: float,
    peak: float,
    bandwidth: float,
    with_accuracy: bool,
    device: str = "cpu",
    baseline: str = "auto",
) -> Result:
    """peak and bandwidth: operations and bytes a second. Raises BackendRefuses."""
    torch.manual_seed(0)

    def moved(x: object) -> object:
        return x.to(device) if isinstance(x, Tensor) else x

    inputs = [x.to(device) for x in case.inputs(dtype)]
    grad = torch.randn(case.batch, case.heads, case.query_length, case.head_dim).to(dtype).to(device)
    options = {name: moved(x) for name, x in case.kwargs(dtype).items()}
    backend = BACKENDS[baseline]
    calls = [as_call(f, inputs, grad, options, mode) for f in (ours, torchs)]
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        try:
            calls[1]()
        except RuntimeError as error:
            if backend is None:
                raise
            raise BackendRefuses(str(error)) from error
        timing = interleave(calls, seconds, device)
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
        device=device,
        baseline=baseline,
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
