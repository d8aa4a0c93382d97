"""Finds and loads the library of operators; torch_attn/__init__.py calls load() before anything names an operator.

A C++ library works with the one release of torch that it was built for. With another it fails to load, with a linker's
message about a mangled name, so load() compares the releases first and says what to do.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

PACKAGE_DIR = Path(__file__).parent
LIBRARY = PACKAGE_DIR / "lib" / "libtorch_attn.so"
BUILD_INFO = PACKAGE_DIR / "lib" / "build_info.json"

REBUILD = "run `pip install --no-build-isolation --no-deps --force-reinstall .` (or `make build`) in its source folder"


def build_info() -> dict[str, str]:
    """What CMake wrote beside the library: version, torch, cuda_architectures, cuda_off_reason."""
    return json.loads(BUILD_INFO.read_text())


def load() -> None:
    """Load the library into this process, which registers its operators; loading it again does nothing."""
    if not LIBRARY.exists() or not BUILD_INFO.exists():
        raise ImportError(f"torch_attn's compiled library is not at {LIBRARY}: to build it, {REBUILD}.")
    built_for = build_info()["torch"]
    if torch.__version__.split("+")[0] != built_for:
        raise ImportError(
            f"torch_attn was built for torch {built_for}, but torch {torch.__version__} is running: to rebuild it for "
            f"this torch, {REBUILD}."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(f"torch_attn's library does not load ({error}): to rebuild it, {REBUILD}.") from error
