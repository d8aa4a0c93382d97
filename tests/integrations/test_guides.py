"""docs/integrations.md and docs/migrating.md: their code runs as it stands, and the names in them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torch_attn

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ["integrations.md", "migrating.md"]

pytestmark = pytest.mark.filterwarnings("ignore:'norm' was found in ScriptModule constants")


@pytest.mark.parametrize("guide", GUIDES)
def test_the_code_of_the_guide_runs(guide: str) -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, f"docs/{guide}", "exec"), names)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_names_in_the_guide_exist(guide: str) -> None:
    text = (DOCS / guide).read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w.])torch_attn\.(\w+)", text))
    assert {name for name in names if not hasattr(torch_attn, name)} <= {"integrations", "info"}, "modules aside"
