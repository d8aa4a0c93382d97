"""The documentation's site builds without a warning, misses no picture, and documents everything that is exported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_attn

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", DOCS, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_picture_of_a_page_is_in_the_site(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]
    assert len(pages) > 10
    for page in pages:
        for picture in re.findall(r'<(?:img|source)[^>]+src(?:set)?="([^"]+\.png)"', page.read_text(encoding="utf-8")):
            assert (page.parent / picture).is_file(), f"{page.name} shows {picture}, which is not there"


def test_every_exported_name_is_in_the_reference(site: Path) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in torch_attn.__all__:
        kind = getattr(torch_attn, name)
        module = kind.__name__ if name in ("plot", "distributed") else f"torch_attn.{name}"
        assert f'id="{module}"' in reference or f'id="module-{module}"' in reference, name


@pytest.mark.parametrize("page", ["getting_started.md"])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, f"docs/{page}", "exec"), names)


def test_the_cpp_page_shows_what_a_test_compiles() -> None:
    def squeezed(text: str) -> str:
        return re.sub(r"\s+", "", text)

    tested = squeezed((DOCS.parent / "tests" / "build" / "training.cpp").read_text(encoding="utf-8"))
    page = (DOCS / "cpp.md").read_text(encoding="utf-8")
    declaration = re.search(r"const auto attention = .*?;\n", page, re.DOTALL)
    assert declaration and squeezed(declaration[0]) in tested
