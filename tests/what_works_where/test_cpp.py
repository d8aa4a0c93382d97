"""A C++ program without Python runs what Python packaged and scripted, of each option, to the same answers."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torch_attn.utils

from ..conftest import SESSION_SEED
from .layers import OPTIONS
from .programs import SHAPES, Answers, example, in_bfloat16, model, sorted_by_option, wanted
from .table import works
from .test_programs import ORDER, package

PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(programs LANGUAGES CXX)
find_package(torch_attn REQUIRED)
add_executable(programs {source})
target_link_libraries(programs PRIVATE torch_attn::torch_attn)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "CMakeLists.txt").write_text(PROJECT.format(source=Path(__file__).with_name("programs.cpp")))
    prefix = f"-DCMAKE_PREFIX_PATH={torch_attn.utils.cmake_prefix_path}"
    for command in (["-S", folder, "-B", folder / "build", "-G", "Ninja", prefix], ["--build", folder / "build"]):
        subprocess.run(["cmake", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder / "build" / "programs"


@pytest.fixture(scope="module")
def given(program: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answers]]:
    """What the program answers, by route; of each an entry a shape."""
    folder = tmp_path_factory.mktemp("answers")
    torch.jit.script(model()).save(str(folder / "scripted.pt"))
    torch.save([example(*shape) for shape in SHAPES], folder / "inputs.pt")
    files = [package(), folder / "scripted.pt", folder / "inputs.pt", folder / "answers.pt"]
    subprocess.run([program, *files, str(SESSION_SEED)], check=True)
    answers = iter(torch.load(folder / "answers.pt", weights_only=False))

    def take(count: int) -> list[Tensor]:
        return [next(answers) for _ in range(count)]

    routes: dict[str, list[Answers]] = {n: [] for n in ("package", "autocast", "script", "freeze", "optimize")}
    names = [name for name, _ in model().named_parameters()]
    count = len(OPTIONS)
    for _ in SHAPES:
        routes["package"].append([[y] for y in take(count)])
        routes["autocast"].append([[y] for y in take(count - 1)])
        routes["script"].append(
            sorted_by_option(take(count), take(1)[0], dict(zip(names, take(len(names)), strict=True)))
        )
        routes["freeze"].append([[y] for y in take(count)])
        routes["optimize"].append([[y] for y in take(count)])
    assert next(answers, None) is None
    return routes


def agree(option: str, answers: list[Answers], around: type = contextlib.nullcontext) -> None:
    index = list(OPTIONS).index(option)
    for shape, actual in zip(SHAPES, answers, strict=True):
        differentiate = len(actual[index]) > 1
        torch.testing.assert_close(actual[index], wanted(*shape, differentiate, around)[index])


@works("AOTInductor package", "inference; dynamic batch and length")
def test_ahead_of_time(given: dict[str, list[Answers]], option: str) -> None:
    agree(option, given["package"])


@works("the same, autocast inside", "inference; dynamic batch and length", without={"dropout": ORDER})
def test_ahead_of_time_autocast(given: dict[str, list[Answers]], option: str) -> None:
    agree(option, given["autocast"], in_bfloat16)


@works("`torch::jit::load`", "with gradients")
def test_script(given: dict[str, list[Answers]], option: str) -> None:
    agree(option, given["script"])


@works("`torch::jit::freeze`, `optimize_for_inference`", "inference")
def test_freeze(given: dict[str, list[Answers]], option: str) -> None:
    agree(option, given["freeze"])
    agree(option, given["optimize"])
