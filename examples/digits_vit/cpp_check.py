"""Saves a trained model with TorchScript, builds examples/cpp against torch_attn's CMake package, and has it classify
the test images to the same answers. Used by demo.py and by the tests.
"""

import os
import subprocess
import sysconfig
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_attn.utils
from training import predict

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "examples" / "cpp"
BUILD = REPOSITORY / "build" / "examples_cpp"


def save(model: nn.Module, images: Tensor, folder: Path) -> tuple[Path, Path]:
    """Write the scripted model, and the test images with Python's answers, as files that C++ can read."""
    folder.mkdir(parents=True, exist_ok=True)
    model_file, images_file = folder / "vit.pt", folder / "test_images.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, and its word on a constant in nn.Transformer
        torch.jit.script(model.eval()).save(str(model_file))
    torch.save({"images": images, "predictions": predict(model, images)}, images_file)
    return model_file, images_file


def build() -> Path:
    """Configure and build the program; a second call finds nothing to do."""
    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # where pip put cmake and ninja
    prefix = f"-DCMAKE_PREFIX_PATH={torch_attn.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja", prefix], ["cmake", "--build", BUILD]):
        step = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": tools})
        if step.returncode != 0:
            raise SystemExit(f"examples/cpp does not build:\n{step.stdout}{step.stderr}")
    return BUILD / "classify"


def classify(model_file: Path, images_file: Path) -> str:
    """What the program says; raises if it gives other answers than Python."""
    command = [build(), model_file, images_file]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
