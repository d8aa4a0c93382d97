"""Two processes that train by DDP or FSDP2 have the losses of one: the last section of the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .distributed import Model, make, train
from .table import works

REPOSITORY = Path(__file__).parents[2]
DROPOUT = "Two processes draw other bits than one, so that there is nothing to compare."
Losses = list[list[float]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Losses]:
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", f"{__package__}.distributed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(r), "2", folder], cwd=REPOSITORY, env=environment) for r in range(2)]
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    alone = train(*make())
    assert all(last < first for first, last in zip(alone[0], alone[-1], strict=True)), "the losses should fall"
    return {"alone": alone, **json.loads((folder / "losses.json").read_text())}


def agree(option: str, actual: Losses, wanted: Losses) -> None:
    index = Model().options.index(option)
    assert [step[index] for step in actual] == pytest.approx([step[index] for step in wanted], rel=1e-9)


@works("`DistributedDataParallel`", "losses of two processes (gloo) equal one process's", without={"dropout": DROPOUT})
def test_data_parallel(losses: dict[str, Losses], option: str) -> None:
    agree(option, losses["ddp"], losses["alone"])


@works("FSDP2 (`fully_shard`)", "losses of two processes (gloo) equal one process's", without={"dropout": DROPOUT})
def test_fully_sharded(losses: dict[str, Losses], option: str) -> None:
    agree(option, losses["fsdp"], losses["alone"])
