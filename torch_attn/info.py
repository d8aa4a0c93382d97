"""`python -m torch_attn.info`: what was built, what runs, and why each tier is on or off. For bug reports.

:func:`explain` says the same of one call: which kernels serve it, and why others would not.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from ._library import LIBRARY, build_info

ISA_VARIABLE = "TORCH_ATTN_CPU_ISA"
OPERATIONS = ("attention", "attention_weights", "attention_statistics", "hard_attention")


def cuda_state(build: dict[str, str]) -> str:
    """Whether a CUDA tensor meets this library's CUDA kernels; if not, it gets the composite."""
    if build["cuda_off_reason"]:
        return f"off: {build['cuda_off_reason']}"
    compiled = f"compiled for {build['cuda_architectures']}"
    if not torch.backends.cuda.is_built():
        return f"off: {compiled}, but this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"off: {compiled}, but torch finds no GPU"
    return f"on: {compiled}; {torch.cuda.get_device_name()}"


@dataclass(frozen=True)
class Answer:
    """One tier's answer to a call: how it would serve it, or (``serves`` is False) why it cannot."""

    tier: str
    serves: bool
    text: str


@dataclass(frozen=True)
class Explanation:
    """All tiers' answers, in the order in which they are asked; the first that serves the call does."""

    answers: tuple[Answer, ...]

    @property
    def tier(self) -> str:
        return next(answer.tier for answer in self.answers if answer.serves)

    def __str__(self) -> str:
        chosen, lines = self.tier, []
        for answer in self.answers:
            state = "cannot" if not answer.serves else "serves" if answer.tier == chosen else "could"
            lines.append(f"{answer.tier:<10}  {state}: {answer.text}")
        return "\n".join(lines)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    *,
    operation: str = "attention",
    backward: bool = False,
    compute_capability: int | None = None,
    multiprocessors: int | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    causal_alignment: str = "top_left",
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Explanation:
    """Which kernels serve a call of :func:`torch_attn.attention`, and why those before them do not. Computes nothing.

    Args:
        query, key, value: (B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv); their values are not read.
            Maps have no value.
        operation: ask about another function: "attention_weights", "attention_statistics" or "hard_attention".
        backward: ask about the gradients, not about the output.
        compute_capability: of a GPU to ask about, for instance 80 for sm_80, whatever the tensors' device is; None: ask
            about the tensors' own device.
        multiprocessors: of that GPU; None: 108, or the own device's.
        attn_mask and what follows: as in :func:`torch_attn.attention`.

    Raises:
        RuntimeError: where a GPU is asked about and the library holds no CUDA kernels, or the arguments are wrong.
        ValueError: where operation is none of those.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"explain: operation must be one of {', '.join(OPERATIONS)}, but it is {operation}.")
    if value is None:
        if operation in ("attention", "hard_attention"):
            raise ValueError(f"explain: value must be given where operation is {operation}.")
        value = key[..., :0]
    composite = Answer("composite", True, "PyTorch's operators, which store the scores")
    if query.device.type == "cpu" and compute_capability is None:
        return Explanation((Answer("cpu", True, f"compiled for {torch.ops.torch_attn.cpu_isa()}"), composite))
    if query.device.type not in ("cpu", "cuda"):
        return Explanation((composite,))
    if reason := build_info()["cuda_off_reason"]:
        if compute_capability is not None:
            raise RuntimeError(f"explain: compute_capability is {compute_capability}, but CUDA is off: {reason}.")
        return Explanation((composite,))
    texts = torch.ops.torch_attn.cuda_tiers(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        causal_alignment=causal_alignment,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        key_lengths=key_lengths,
        backward=backward,
        compute_capability=compute_capability or 0,
        multiprocessors=multiprocessors or 0,
        operation=operation,
    )
    triples = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    return Explanation(tuple(Answer(tier, not refusal, refusal or form) for tier, form, refusal in triples))


def report() -> str:
    """The report as text, one fact a line."""
    build = build_info()
    available = ", ".join(torch.ops.torch_attn.cpu_isas())
    forced = os.environ.get(ISA_VARIABLE)
    how = f"forced by {ISA_VARIABLE}={forced}" if forced else f"the best available; {ISA_VARIABLE} is not set"
    sections = {
        "versions": {
            "torch_attn": build["version"],
            "built for torch": build["torch"],
            "running torch": torch.__version__,
            "Python": platform.python_version(),
            "system": platform.platform(),
        },
        "library": {
            "file": str(LIBRARY),
            "compiled as": torch.ops.torch_attn.build_info(),
        },
        "tiers": {
            "cpu": f"on: {torch.ops.torch_attn.cpu_isa()} ({how})",
            "cpu instruction sets": available,
            "cpu threads": str(torch.get_num_threads()),
            "cuda": cuda_state(build),
            "cuda tiers": "sm90 (Hopper), sm80 (tensor cores), simt (all else); torch_attn.info.explain asks them",
            "composite": "on: other devices, and derivatives beyond the second",
        },
    }
    width = max(len(name) for facts in sections.values() for name in facts)
    lines = []
    for section, facts in sections.items():
        lines.append(section)
        lines += [f"  {name:<{width}}  {fact}" for name, fact in facts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
