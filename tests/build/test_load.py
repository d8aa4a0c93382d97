"""Importing torch_attn: errors that say what to do, and company of PyTorch's own operators of the same namespace."""

import json
import shutil
from pathlib import Path

import pytest

from .conftest import run_python


@pytest.fixture
def copy(site: Path, tmp_path: Path) -> Path:
    """The installed package once more, for a test to spoil."""
    shutil.copytree(site / "torch_attn", tmp_path / "torch_attn")
    return tmp_path


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_another_torch_release_is_one_clear_import_error(copy: Path) -> None:
    build_info = copy / "torch_attn" / "lib" / "build_info.json"
    build_info.write_text(json.dumps({**json.loads(build_info.read_text()), "torch": "2.12.1"}))
    error = last_line(run_python("import torch_attn", copy).stderr)
    assert error.startswith("ImportError: torch_attn was built for torch 2.12.1, but torch 2.13.0")
    assert "pip install --no-build-isolation" in error


def test_another_build_of_the_same_torch_release_is_accepted(copy: Path) -> None:
    code = "import torch; torch.__version__ = torch.__version__.split('+')[0] + '+cu130'; import torch_attn"
    result = run_python(code, copy)
    assert result.returncode == 0, result.stderr


def test_missing_library_is_one_clear_import_error(copy: Path) -> None:
    (copy / "torch_attn" / "lib" / "libtorch_attn.so").unlink()
    error = last_line(run_python("import torch_attn", copy).stderr)
    assert error.startswith("ImportError: torch_attn's compiled library is not at")
    assert "pip install --no-build-isolation" in error


def test_damaged_library_is_one_clear_import_error(copy: Path) -> None:
    (copy / "torch_attn" / "lib" / "libtorch_attn.so").write_bytes(b"not a library")
    error = last_line(run_python("import torch_attn", copy).stderr)
    assert error.startswith("ImportError: torch_attn's library does not load")


@pytest.mark.parametrize(
    "imports",
    ["import torch_attn, torch.nn.attention.varlen", "import torch.nn.attention.varlen, torch_attn"],
    ids=["torch_attn first", "varlen first"],
)
def test_lives_beside_pytorchs_operators_of_the_same_namespace(imports: str) -> None:
    """torch.nn.attention.varlen registers torch_attn::_varlen_attn and more."""
    code = f"""
{imports}
import torch
q = torch.randn(1, 2, 5, 8)
torch_attn.attention(q, q, q)
print(torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn.attention)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["torch_attn._varlen_attn", "torch_attn.attention"]


def test_loading_twice_does_nothing() -> None:
    from torch_attn import _library

    _library.load()
    _library.load()
