"""Runs one case: ours and PyTorch's in turn, with accuracy beside speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case, ours, plain_cases, torchs, torchs_math
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
class OptionCost:
    """What a case's options cost us: the time for a score that is touched, over that of a plain call of ours in the
    same rounds, less 1. The median of the rounds, with the quartiles as spread."""

    plain: str
    cost: float
    cost_low: float
    cost_high: float


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
    # Of decoding: what reading the cache once takes, as a share of the measured bandwidth; torch's bounds the speedup.
    share_of_bandwidth: float | None
    share_of_bandwidth_torch: float | None
    error_ours: float | None
    error_torch: float | None
    rounds: int
    option_costs: list[OptionCost]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def forward(attention: Attention, inputs: list[Tensor], direction: Tensor, options: dict) -> list[Tensor]:
    with torch.no_grad():
        return [attention(*inputs, **options)]


def forward_and_backward(attention: Attention, inputs: list[Tensor], direction: Tensor, options: dict) -> list[Tensor]:
    out = attention(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction)]


def forward_mode(attention: Attention, inputs: list[Tensor], direction: Tensor, options: dict) -> list[Tensor]:
    """The tangent along the inputs themselves."""
    with torch.no_grad(), fwAD.dual_level():
        out = attention(*(fwAD.make_dual(x, x.detach()) for x in inputs), **options)
        return [*fwAD.unpack_dual(out)]


def double_backward(attention: Attention, inputs: list[Tensor], direction: Tensor, options: dict) -> list[Tensor]:
    """The gradient of a gradient penalty, forward and first backward included."""
    out = attention(*inputs, **options)
    gradients = torch.autograd.grad(out, inputs, direction, create_graph=True)
    return [*torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)]


COMPUTE = {
    "forward": forward,
    "forward+backward": forward_and_backward,
    "jvp": forward_mode,
    "double backward": double_backward,
}
BASELINE = {"forward": torchs, "forward+backward": torchs, "jvp": torchs_math, "double backward": torchs_math}


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor, dict]:
    """Query, key and value; a direction of the output; options."""
    inputs = [x.to(device) for x in case.inputs(dtype)]
    direction = torch.randn(case.batch, case.heads, case.query_length, case.head_dim).to(dtype).to(device)
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in case.kwargs(dtype).items()}
    return inputs, direction, options


def as_call(
    attention: Attention, inputs: list[Tensor], direction: Tensor, options: dict, mode: str
) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: COMPUTE[mode](attention, leaves, direction, options)


def worst_error(attention: Attention, inputs: list[Tensor], direction: Tensor, options: dict, mode: str) -> float:
    """Against torch's float64 answer on the same (rounded) inputs."""

    def results(function: Attention, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        cast = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in options.items()}
        return COMPUTE[mode](function, leaves, direction.to(dtype), cast)

    exact = results(BASELINE[mode], torch.float64)
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

    inputs, direction, options = draw(case, dtype, device)
    plains = plain_cases(case)
    backend = BACKENDS[baseline]
    calls = [as_call(f, inputs, direction, options, mode) for f in (ours, BASELINE[mode])]
    calls += [as_call(ours, *draw(plain, dtype, device), mode) for plain in plains]
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        try:
            calls[1]()
        except RuntimeError as error:
            if backend is None:
                raise
            raise BackendRefuses(str(error)) from error
        timing = interleave(calls, seconds, device)
    middle, low, high = timing.speedup()
    costs = []
    for i, plain in enumerate(plains, start=2):
        scores = plain.touched_scores() / case.touched_scores()
        costs.append(OptionCost(plain.name, *(scores * x - 1 for x in timing.speedup(i, 0))))
    flops = case.flops(mode) / timing.best(0)
    cache_bytes = sum(x.numel() * x.element_size() for x in inputs[1:])
    shares = [cache_bytes / timing.best(i) / bandwidth if case.group == "decode" else None for i in range(2)]
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
        share_of_bandwidth=shares[0],
        share_of_bandwidth_torch=shares[1],
        error_ours=worst_error(ours, inputs, direction, options, mode) if comparable else None,
        error_torch=worst_error(BASELINE[mode], inputs, direction, options, mode) if comparable else None,
        rounds=len(timing.rounds),
        option_costs=costs,
    )
