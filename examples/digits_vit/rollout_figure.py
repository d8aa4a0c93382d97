"""The second picture of the demo: from which patches the answer is made, through all layers (attention rollout)."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import torch_attn
from model import VisionTransformer

matplotlib.use("Agg")  # draws into a file, so no screen is needed
from matplotlib import pyplot  # noqa: E402

BACKGROUNDS = {"light": "#ffffff", "dark": "#10131a"}


@torch.no_grad()
def class_token_rollout(model: VisionTransformer, images: Tensor) -> Tensor:
    """(batch, patches): how much of each patch arrives in the last layer's class token."""
    model.eval()
    with torch_attn.record_attention(model) as record:
        model(images)
    return torch_attn.attention_rollout(record.last_maps())[:, 0, 1:]


def draw(model: VisionTransformer, images: Tensor, labels: Tensor, file: Path, style: str = "light") -> None:
    """The first test image of each digit. A patch glows by what it gives beyond the least of its image: some of every
    patch arrives, by way of the others. One colour scale serves all.
    """
    first_of_each = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    images = images[first_of_each]
    shares = class_token_rollout(model, images)
    shares = shares - shares.amin(1, keepdim=True)
    predictions = model(images).argmax(dim=1).tolist()
    ink = images if style == "dark" else -images  # dark on light, light on dark
    figure, axes = pyplot.subplots(2, 5, figsize=(8, 3.7), layout="constrained", facecolor=BACKGROUNDS[style])
    for axis, image, weights, prediction in zip(axes.flat, ink, shares, predictions, strict=True):
        torch_attn.plot.image_overlay(
            image,
            weights,
            vmax=shares.max().item(),
            title=f"“{prediction}”",
            value_label="rollout above least",
            ax=axis,
            style=style,
        )
        if axis is not axes.flat[-1]:
            axis.images[-1].colorbar.remove()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
