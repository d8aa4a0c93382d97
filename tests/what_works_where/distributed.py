"""One of two processes that train a model of all options together, by DDP or FSDP2, over gloo; test_training.py starts
both and compares their losses with its own.

    python -m tests.what_works_where.distributed RANK WORLD_SIZE FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from .layers import HEADS, OPTIONS, WIDTH, Layer

STEPS, BATCH, LENGTH = 4, 4, 6


class Model(nn.Module):
    """Each option's layer between two projections of its own; the loss of a layer is apart from the others'."""

    def __init__(self) -> None:
        super().__init__()
        # Without dropout, whose draws depend on how a batch is divided.
        self.options = [option for option in OPTIONS if option != "dropout"]
        self.layers = nn.ModuleList([Layer(option, torch.float64) for option in self.options])
        self.projections = nn.ModuleList([nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in self.options])

    def forward(self, x: Tensor) -> Tensor:
        """(B, HEADS, L, WIDTH) -> the mean loss of each option."""
        pairs = zip(self.projections, self.layers, strict=True)
        return torch.stack([layer(projection(x)).sin().square().mean() for projection, layer in pairs])


def make() -> tuple[Model, Tensor]:
    """The model and the batch of all steps, the same in every process."""
    torch.manual_seed(0)
    return Model(), torch.randn(BATCH, HEADS, LENGTH, WIDTH, dtype=torch.float64)


def train(model: nn.Module, x: Tensor, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> list[list[float]]:
    """The losses of every step, by option."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(x)
        loss.sum().backward()
        optimizer.step()
        losses.append(reduce(loss.detach()).tolist())
    return losses


def main(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.set_num_threads(1)

    def mean(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x / world_size

    losses = {}
    for kind in ("ddp", "fsdp"):
        model, x = make()
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = dist.init_device_mesh("cpu", (world_size,))
            for part in (*model.layers, model):
                fully_shard(part, mesh=mesh)
        losses[kind] = train(model, x.chunk(world_size)[rank], mean)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
