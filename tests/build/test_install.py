"""`pip install . --no-build-isolation`: what is in the wheel, and that the installed package works on its own."""

import re
import zipfile
from email.parser import Parser
from pathlib import Path

import torch

from .conftest import REPOSITORY, run_python


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"torch_attn-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)


def test_wheel_holds_the_package_the_library_and_the_cmake_package(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "torch_attn").rglob("*.py")}
    built = {
        "torch_attn/lib/libtorch_attn.so",
        "torch_attn/lib/build_info.json",
        "torch_attn/share/cmake/torch_attn/torch_attnConfig.cmake",
        "torch_attn/share/cmake/torch_attn/torch_attnConfigVersion.cmake",
        "torch_attn/share/cmake/torch_attn/torch_attnTargets.cmake",
        "torch_attn/share/cmake/torch_attn/torch_attnTargets-release.cmake",
        "torch_attn/share/cmake/torch_attn/torch_attnTorch.cmake",
    }
    viewer = {f"torch_attn/plot/viewer/{name}" for name in ("page.html", "style.css", "maps.js", "viewer.js")}
    assert files == modules | built | viewer | {"torch_attn/py.typed"}


def test_wheel_requires_the_torch_it_was_built_for_and_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata_file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(metadata_file).decode())
    needed = [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]
    assert needed == [f"torch=={torch.__version__.split('+')[0]}"]


def test_installed_package_runs_away_from_the_source_tree(site: Path) -> None:
    code = """
import torch, torch_attn
q = torch.randn(1, 2, 5, 8)
out = torch_attn.scaled_dot_product_attention(q, q, q)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
print(torch_attn.__file__)
"""
    result = run_python(code, site)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(site)


def test_no_path_of_the_build_machine_is_installed(site: Path) -> None:
    for file in (site / "torch_attn" / "share").rglob("*.cmake"):
        assert str(REPOSITORY) not in file.read_text(), file


def test_import_does_not_load_the_demo_or_compiler_packages(site: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import torch_attn
print({name.split(".")[0] for name in set(sys.modules) - before})
"""
    result = run_python(code, site)
    assert result.returncode == 0, result.stderr
    assert not {"matplotlib", "sklearn", "tqdm", "scipy", "transformers"} & eval(result.stdout)
