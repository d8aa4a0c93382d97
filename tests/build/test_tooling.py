"""The project's own promises about its set-up."""

import re

from torch_attn import _library

from .conftest import REPOSITORY


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_every_development_requirement_is_pinned() -> None:
    lines = (REPOSITORY / "requirements-dev.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in wanted)


def test_build_and_development_requirements_name_one_torch() -> None:
    (required,) = re.findall(r'"torch==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert required == pins()["torch"]


def test_changelog_has_an_entry_for_this_version() -> None:
    assert f"## {_library.build_info()['version']}" in (REPOSITORY / "CHANGELOG.md").read_text()
