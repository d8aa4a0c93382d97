"""What several examples share: a training loop with a progress bar, and saving a model to load it again.

Examples in folders beside this one put it on their path; see examples/translation/demo.py.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange


def fit(
    model: nn.Module,
    loss_of_step: Callable[[], Tensor],
    steps: int,
    rate: float,
    label: str,
    weight_decay: float = 0.01,
) -> float:
    """AdamW with a one-cycle learning rate that peaks at ``rate``. Returns the seconds; the model is left in eval()."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    start = time.perf_counter()
    with trange(steps, desc=label, unit="step") as bar:
        for step in bar:
            loss = loss_of_step()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    return time.perf_counter() - start


def save_scripted(model: nn.Module, file: Path) -> torch.jit.ScriptModule:
    """Script the model, save it, and load it from the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated, and its word on a constant in nn.Transformer
        torch.jit.script(model).save(str(file))
        return torch.jit.load(str(file))


def options(description: str | None, script: str, **defaults: int) -> argparse.Namespace:
    """The command line of an example: --seed, --out and a number for each of ``defaults``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--out", type=Path, default=Path(script).parent / "out", help="folder of what is written")
    return parser.parse_args()
