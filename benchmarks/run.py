"""Runs one case: ours and PyTorch's in turn, and ours without the case's option; with accuracy beside speed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case, ours, torchs, torchs_math
from .measure import Timing, interleave

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
    # Of decoding: what reading the cache once takes, as a share of the measured bandwidth; torch's bounds the speedup.
    share_of_bandwidth: float | None
    share_of_bandwidth_torch: float | None
    error_ours: float | None
    error_torch: float | None
    rounds: int
    # Of a case with an option: what it costs us over ``Case.plain``, as a share of that.
    option_cost: float | None = None
    option_cost_low: float | None = None
    option_cost_high: float | None = None

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


def option_cost(case: Case, plain: Case, timing: Timing, contender: int) -> tuple[float, float, float]:
    """Our time for a block of scores that is touched over that of the plain call (``contender``) in the same round,
    less 1: median and quartiles."""
    scores = plain.touched_scores() / case.touched_scores()
    middle, low, high = timing.speedup(contender, baseline=0)
    return middle * scores - 1, low * scores - 1, high * scores - 1


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

    def drawn(of: Case) -> tuple[list[Tensor], Tensor]:
        inputs = [x.to(device) for x in of.inputs(dtype)]
        return inputs, torch.randn(of.batch, of.heads, of.query_length, of.head_dim).to(dtype).to(device)

    inputs, direction = drawn(case)
    options = {name: moved(x) for name, x in case.kwargs(dtype).items()}
    backend = BACKENDS[baseline]
    calls = [as_call(f, inputs, direction, options, mode) for f in (ours, BASELINE[mode])]
    plain = case.plain_case()
    if plain:
        calls.append(as_call(ours, *drawn(plain), {}, mode))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        try:
            calls[1]()
        except RuntimeError as error:
            if backend is None:
                raise
            raise BackendRefuses(str(error)) from error
        timing = interleave(calls, seconds * len(calls) / 2, device)  # as much for each call, be they two or three
    middle, low, high = timing.speedup()
    flops = case.flops(mode) / timing.best(0)
    cache_bytes = sum(x.numel() * x.element_size() for x in inputs[1:])
    shares = [cache_bytes / timing.best(i) / bandwidth if case.group == "decode" else None for i in range(2)]
    cost, cost_low, cost_high = option_cost(case, plain, timing, 2) if plain else (None, None, None)
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
        option_cost=cost,
        option_cost_low=cost_low,
        option_cost_high=cost_high,
    )
