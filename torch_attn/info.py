"""`python -m torch_attn.info`: what was built, what runs, and why each tier is on or off. For bug reports."""

from __future__ import annotations

import os
import platform

import torch

from ._library import LIBRARY, build_info

ISA_VARIABLE = "TORCH_ATTN_CPU_ISA"


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
