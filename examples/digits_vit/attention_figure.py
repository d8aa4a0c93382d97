"""The picture of the demo: where each head of the last layer looks when it classifies a digit."""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from model import VisionTransformer

matplotlib.use("Agg")  # draws into a file, so no screen is needed
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402

GLOW = LinearSegmentedColormap.from_list("glow", [(0.90, 0.25, 0.05, 0.0), (0.90, 0.25, 0.05, 0.85)])


@torch.no_grad()
def class_token_attention(model: VisionTransformer, images: Tensor) -> Tensor:
    """(batch, heads, patches): the last layer's attention weights from the class token to each patch."""
    model.eval()
    *before, last = model.encoder.layers
    tokens = model.tokens(images)
    for layer in before:
        tokens = layer(tokens)
    tokens = last.norm1(tokens)
    _, weights = last.self_attn(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)
    return weights[:, :, 0, 1:]


def draw(model: VisionTransformer, images: Tensor, labels: Tensor, file: Path) -> None:
    """One column a digit, one row a head; the redder a patch, the more of the head's attention it gets."""
    first_of_each = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    images = images[first_of_each]
    weights = class_token_attention(model, images)
    predictions = model(images).argmax(dim=1)
    heads = weights.size(1)
    side = round(weights.size(2) ** 0.5)
    pixels = images.size(-1)

    figure, axes = pyplot.subplots(1 + heads, len(images), figsize=(10, 5.6), layout="constrained")
    for column, (image, prediction) in enumerate(zip(images, predictions.tolist(), strict=True)):
        for row in range(1 + heads):
            axis = axes[row, column]
            axis.imshow(image[0].numpy(), cmap="gray_r", vmin=-1, vmax=1 if row == 0 else 2.5)
            axis.set(xticks=[], yticks=[])
            if row > 0:
                shares = weights[column, row - 1].view(side, side).numpy()
                extent = (-0.5, pixels - 0.5, pixels - 0.5, -0.5)
                glow = axis.imshow(shares, cmap=GLOW, vmin=0, vmax=0.5, extent=extent, interpolation="nearest")
        axes[0, column].set_title(f"“{prediction}”", fontsize=11)
    for row in range(1 + heads):
        axes[row, 0].set_ylabel("image" if row == 0 else f"head {row}", fontsize=10)
    bar = figure.colorbar(glow, ax=axes[1:, :], shrink=0.7, pad=0.01, extend="max")
    bar.set_label("share of the head's attention", fontsize=9)
    figure.suptitle("Attention of the class token over the patches, last layer; above, the model's answer", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
