"""`python -m torch_attn.info` names what was built and what runs."""

import os
import subprocess
import sys

import pytest
import torch

from torch_attn import _library


def info(**variables: str) -> dict[str, str]:
    command = [sys.executable, "-m", "torch_attn.info"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=True)
    facts = [line.strip().split("  ", 1) for line in result.stdout.splitlines() if line.startswith("  ")]
    return {name: fact.strip() for name, fact in facts}


def test_info_names_both_torch_releases() -> None:
    facts = info()
    assert facts["torch_attn"] == _library.build_info()["version"]
    assert facts["built for torch"] == torch.__version__.split("+")[0]
    assert facts["running torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA may be on where there is a GPU")
def test_info_says_why_cuda_is_off() -> None:
    assert info()["cuda"].startswith("off: ")


@pytest.mark.parametrize("isa", torch.ops.torch_attn.cpu_isas())
def test_info_names_the_forced_instruction_set(isa: str) -> None:
    facts = info(TORCH_ATTN_CPU_ISA=isa)
    assert facts["cpu"] == f"on: {isa} (forced by TORCH_ATTN_CPU_ISA={isa})"
    assert isa in facts["cpu instruction sets"].split(", ")
