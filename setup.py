"""Builds torch_attn: CMake and Ninja compile one library of operators and install it into the Python package.

Called by pip (`pip install . --no-build-isolation`) and by `make build`. The environment may hold CMAKE_ARGS (more
arguments for CMake's configure step, e.g. -DTORCH_ATTN_CUDA=OFF) and MAX_JOBS (how many files to compile at once).
"""

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "torch_attn"


def installed_torch() -> tuple[str, Path]:
    """Release and folder of the torch to build for, found without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "torch_attn is compiled against the installed torch, and there is none: run `pip install torch==2.13.0` "
            "first, then `pip install . --no-build-isolation`."
        )
    release = importlib.metadata.version("torch").split("+")[0]
    return release, Path(spec.submodule_search_locations[0])


def tool(name: str) -> str:
    """Path of a build tool; one that pip installed beside this Python comes before the system's."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise SystemExit(f"torch_attn needs {name} to build, and it is not on the PATH: run `pip install {name}`.")
    return found


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package folder: the tree's own, or the wheel's."""

    def run(self) -> None:
        _, torch_dir = installed_torch()
        cmake = tool("cmake")
        build_dir = ROOT / "build" / "cmake"  # one for every way of building, so that each finds the last one's objects
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        # Named each time: an isolated build's Ninja is gone when the next build reads the cache.
        configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DTORCH_DIR={torch_dir}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", str(build_dir), "--prefix", str(self.package_dir())], check=True)

    def package_dir(self) -> Path:
        return ROOT / PACKAGE if self.inplace else Path(self.build_lib).resolve() / PACKAGE

    def get_outputs(self) -> list[str]:
        folders = [self.package_dir() / "lib", self.package_dir() / "share"]
        return [str(file) for folder in folders for file in folder.rglob("*") if file.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install reads the files where run() put them


class AnyPythonWheel(bdist_wheel):
    """The library registers operators and has no Python API, so one build serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    # The release it is built for is the only one it loads in (torch_attn/_library.py checks), so require exactly that.
    install_requires=[f"torch=={installed_torch()[0]}"],
    ext_modules=[Extension(f"{PACKAGE}.lib", sources=[])],  # tells setuptools that the wheel is not pure Python
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
