"""A C++ program trains a scripted model, differentiates it twice and calls an operator: to the numbers of Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torch_attn
import torch_attn.utils

PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(training LANGUAGES CXX)
find_package(torch_attn REQUIRED)
add_executable(training {source})
target_link_libraries(training PRIVATE torch_attn::torch_attn)
"""


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch_attn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def python_numbers(model: torch.nn.Module) -> list[float]:
    x = torch.linspace(-1, 1, 2 * 9 * 16, dtype=torch.float64).view(2, 9, 16).sin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    numbers = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        numbers.append(loss.item())
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    (penalty_gradient,) = torch.autograd.grad(gradient.square().sum(), leaf)
    heads = x.view(2, 9, 2, 8).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return [*numbers, penalty_gradient.norm().item(), out.norm().item()]


def test_cpp_trains_and_differentiates_twice_as_python_does(tmp_path: Path, environment: dict[str, str]) -> None:
    source = Path(__file__).with_name("training.cpp")
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(source=source))
    prefix = f"-DCMAKE_PREFIX_PATH={torch_attn.utils.cmake_prefix_path}"
    for command in (["-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", prefix], ["--build", tmp_path / "build"]):
        subprocess.run(["cmake", *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    model = Model()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    program = [tmp_path / "build" / "training", tmp_path / "model.pt"]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    numbers = [float(line) for line in printed.split()]
    assert numbers[4] < numbers[0]
    assert numbers == pytest.approx(python_numbers(model), rel=1e-9)
