"""find_package(torch_attn) from a C++ project. Programs here include no header of torch, so that they compile at once;
tests/examples builds the real consumer.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import torch_attn.utils
from torch_attn import _library

TORCH_DIR = Path(torch.__file__).parent
PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES CXX)
find_package(torch_attn REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE torch_attn::torch_attn)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    (tmp_path / "main.cpp").write_text("int main() { return 0; }\n")
    return tmp_path


def configure(project: Path, environment: dict[str, str], **cache: str | Path) -> subprocess.CompletedProcess:
    settings = [f"-D{name}={value}" for name, value in cache.items()]
    command = ["cmake", "-S", project, "-B", project / "build", "-G", "Ninja", *settings]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_consumer_loads_the_operators_without_naming_a_symbol(project: Path, environment: dict[str, str]) -> None:
    """Also where the linker drops libraries that look unused, as some distributions tell it to."""
    settings = {"CMAKE_PREFIX_PATH": torch_attn.utils.cmake_prefix_path, "CMAKE_EXE_LINKER_FLAGS": "-Wl,--as-needed"}
    result = configure(project, environment, **settings)
    assert result.returncode == 0, result.stderr
    subprocess.run(["cmake", "--build", project / "build"], check=True, env=environment)
    program = project / "build" / "consumer"
    traced = {**environment, "LD_DEBUG": "files"}
    loaded = subprocess.run([program], env=traced, stderr=subprocess.PIPE, text=True, check=True)
    assert f"calling init: {_library.LIBRARY}" in loaded.stderr


def test_package_can_be_moved(project: Path, site: Path, environment: dict[str, str]) -> None:
    """Installed beside torch, as in site-packages, it needs no path but its own."""
    site_packages = project / "site-packages"
    shutil.copytree(site / "torch_attn", site_packages / "torch_attn")
    (site_packages / "torch").symlink_to(TORCH_DIR)
    result = configure(project, environment, CMAKE_PREFIX_PATH=site_packages / "torch_attn" / "share" / "cmake")
    assert result.returncode == 0, result.stderr
    build = subprocess.run(["cmake", "--build", project / "build"], capture_output=True, text=True, env=environment)
    assert build.returncode == 0, build.stdout
    subprocess.run([project / "build" / "consumer"], check=True)


def test_torch_dir_says_where_torch_is(project: Path, site: Path, environment: dict[str, str]) -> None:
    result = configure(project, environment, CMAKE_PREFIX_PATH=site / "torch_attn", TORCH_DIR=TORCH_DIR)
    assert result.returncode == 0, result.stderr


def test_no_torch_is_one_clear_error(project: Path, site: Path, environment: dict[str, str]) -> None:
    result = configure(project, environment, CMAKE_PREFIX_PATH=site / "torch_attn")
    assert result.returncode != 0
    assert "Set TORCH_DIR to the folder of the torch package" in one_line(result.stderr)


def test_another_torch_release_is_one_clear_error(project: Path, environment: dict[str, str]) -> None:
    other = project / "torch"
    other.mkdir()
    for folder in ("include", "lib"):
        (other / folder).symlink_to(TORCH_DIR / folder)
    version_file = other / "share" / "cmake" / "Torch" / "TorchConfigVersion.cmake"
    version_file.parent.mkdir(parents=True)
    version_file.write_text('set(PACKAGE_VERSION "2.12.1")\n')
    result = configure(project, environment, CMAKE_PREFIX_PATH=torch_attn.utils.cmake_prefix_path, TORCH_DIR=other)
    assert result.returncode != 0
    assert "torch_attn was built for torch 2.13.0" in one_line(result.stderr)
    assert "holds torch 2.12.1" in one_line(result.stderr)
