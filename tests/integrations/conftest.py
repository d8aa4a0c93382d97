"""One thread: the models are so small that two threads spend their time waiting for each other. No network either, and
torchvision importable next to a torch without CUDA."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


def torchvision_operators() -> torch.library.Library | None:
    """PyPI's torchvision is built for CUDA. Next to a torch without CUDA its library does not load, and importing it
    fails, as do timm, open_clip and transformers with it: it names two operators of the library. No model here calls
    them, so that their schemas are enough."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


TORCHVISION = torchvision_operators()  # defined for as long as the object lives


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
