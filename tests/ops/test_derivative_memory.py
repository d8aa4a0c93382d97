"""Forward mode and Hessian-vector products of long sequences fit in memory: no (L, S) matrix is stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LENGTH, HEADS, DIM = 8192, 8, 64  # float32 scores alone take 2 GiB, and second order keeps several such matrices

# A process of its own, whose peak is the call's and not an earlier test's.
PROGRAM = f"""
import re, sys
import torch
from torch.func import grad, jvp
import torch_attn

torch.set_num_threads(1)

attention = torch_attn.attention

def loss(*inputs):
    return attention(*inputs).square().sum()

def derivative(inputs, tangents):
    if sys.argv[1] == "jvp":
        return jvp(attention, inputs, tangents)
    return jvp(grad(loss, (0, 1, 2)), inputs, tangents)

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

def tensors(length):
    return tuple(torch.randn(1, {HEADS}, length, {DIM}) for _ in range(3))

derivative(tensors(256), tensors(256))  # loads what is loaded at a first call
inputs, tangents = tensors({LENGTH}), tensors({LENGTH})
before = peak()
derivative(inputs, tangents)
print(peak() - before)
"""


@pytest.mark.parametrize("derivative", ["jvp", "hessian_vector_product"])
def test_long_sequences_need_less_than_a_gibibyte(derivative: str) -> None:
    command = [sys.executable, "-c", PROGRAM, derivative]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    kibibytes = int(done.stdout)
    assert 0 < kibibytes < 1 << 20
