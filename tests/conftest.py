"""What every test shares: a fresh seed a session, the instruction sets of this CPU, and poisoned memory."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterator

import pytest
import torch

import torch_attn  # noqa: F401  (registers the operators)

SESSION_SEED = int(os.environ.get("TORCH_ATTN_TEST_SEED", random.SystemRandom().randrange(2**31)))
os.environ["TORCH_ATTN_TEST_SEED"] = str(SESSION_SEED)  # what is printed is the seed of all workers


def pytest_report_header() -> str:
    isas = " ".join(torch.ops.torch_attn.cpu_isas())
    return f"torch {torch.__version__}, instruction sets {isas}; inputs drawn with TORCH_ATTN_TEST_SEED={SESSION_SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.line(f"inputs were drawn with TORCH_ATTN_TEST_SEED={SESSION_SEED}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Each test draws fresh inputs, from a seed that depends on the session's and on the test's name alone."""
    torch.manual_seed(SESSION_SEED ^ (hash_name(request.node.nodeid) & 0x7FFFFFFF))


def hash_name(name: str) -> int:
    value = 0
    for byte in name.encode():
        value = (value * 131 + byte) & 0xFFFFFFFF
    return value


@pytest.fixture(params=torch.ops.torch_attn.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each instruction set that the CPU has."""
    torch.ops.torch_attn.force_cpu_isa(request.param)
    yield request.param
    torch.ops.torch_attn.force_cpu_isa("")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an output element a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().item()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment with pip's cmake and ninja on the PATH."""
    return {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}
