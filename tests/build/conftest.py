"""A wheel of this checkout and the package installed from it, away from the source tree; shared by the tests here.

The wheel reuses the objects of `make build`, so it takes seconds.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    with open(REPOSITORY / "build" / ".wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers, one builds and the other waits
        subprocess.run([*pip, "-w", folder, REPOSITORY], check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with nothing but the installed package in it."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def run_python(code: str, site: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run code in a fresh Python, away from the source tree, with `site` first on its path."""
    environment = {**os.environ, **variables}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=os.sep)
