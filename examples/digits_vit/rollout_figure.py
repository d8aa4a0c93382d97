"""The second picture of the demo: from which patches the answer is made, through all layers (attention rollout)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import torch_attn
from model import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
from panels import draw_panels  # noqa: E402

DRAWN = (2, 3, 4, 7, 9)


@torch.no_grad()
def class_token_rollout(model: VisionTransformer, images: Tensor) -> Tensor:
    """(batch, patches): how much of each patch arrives in the last layer's class token."""
    model.eval()
    with torch_attn.record_attention(model) as record:
        model(images)
    return torch_attn.attention_rollout(record.last_maps())[:, 0, 1:]


def draw(model: VisionTransformer, images: Tensor, labels: Tensor, folder: Path) -> Path:
    """The first test image of each digit in DRAWN. A patch glows by what it gives beyond the least of its image, as
    some of every patch arrives by way of the others. One colour scale serves all.
    """
    images = torch.stack([images[(labels == digit).nonzero()[0, 0]] for digit in DRAWN])
    shares = class_token_rollout(model, images)
    shares = shares - shares.amin(1, keepdim=True)
    answers = model(images).argmax(dim=1).tolist()

    def draw_each(axes: list, style: str) -> None:
        ink = images if style == "dark" else -images  # dark on light, light on dark
        for place, axis in enumerate(axes):
            torch_attn.plot.image_overlay(
                ink[place],
                shares[place],
                vmax=shares.max().item(),
                title=f"“{answers[place]}”",
                value_label="above the least",
                style=style,
                ax=axis,
            )
            if axis is not axes[-1]:
                axis.images[-1].colorbar.remove()

    return draw_panels(draw_each, len(DRAWN), (9.5, 2.2), folder, "digits_rollout")
