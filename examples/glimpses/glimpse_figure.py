"""The picture of the demo: what the model sees blurred, and which patches it chooses to read."""

from pathlib import Path

import matplotlib
import torch

from canvas import Canvases
from glimpse_model import PATCH, GlimpseModel, corners

matplotlib.use("Agg")  # draws into a file, so no screen is needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e")  # one a glimpse


@torch.no_grad()
def draw(models: dict[str, GlimpseModel], canvases: Canvases, file: Path) -> None:
    """One column a canvas, one row a model, under a row with the blurred view that the choice is made from."""
    count = len(canvases.images)
    rows = 1 + len(models)
    figure, axes = pyplot.subplots(rows, count, figsize=(1.3 * count, 1.45 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    blurred = next(iter(models.values())).blur(canvases.images)
    for column in range(count):
        axes[0, column].imshow(blurred[column, 0].numpy(), cmap="gray_r", vmin=0, vmax=0.7)
        axes[0, column].set_title(f"a {canvases.labels[column]}", fontsize=10)
    axes[0, 0].set_ylabel("blurred view", fontsize=10)

    for row, (name, model) in enumerate(models.items(), start=1):
        logits, choice = model.eval()(canvases.images)
        answers = logits.argmax(-1)
        places = corners(choice.indices.squeeze(-2))
        for column in range(count):
            axis = axes[row, column]
            axis.imshow(canvases.images[column, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            for (y, x), colour in zip(places[column].tolist(), COLOURS, strict=False):
                axis.add_patch(Rectangle((x - 0.5, y - 0.5), PATCH, PATCH, fill=False, edgecolor=colour, linewidth=1.6))
            right = answers[column] == canvases.labels[column]
            axis.set_title(f"“{answers[column]}”", fontsize=10, color="black" if right else "#d62728")
        axes[row, 0].set_ylabel(name, fontsize=10)
    figure.suptitle("The patches that were read, and the answers", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
