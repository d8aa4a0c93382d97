"""The emulated GPU, built once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .emulation import Device, build


@pytest.fixture(scope="session")
def built_device() -> Device:
    # "address" needs AddressSanitizer's runtime in the process from the start: see the Makefile.
    return build(os.environ.get("TORCH_ATTN_EMULATION_CHECK", "races"))


@pytest.fixture
def device(built_device: Device) -> Iterator[Device]:
    """Threads in turn, no planted fault, every tier allowed."""
    built_device.configure()
    built_device.force_tier("")
    yield built_device
