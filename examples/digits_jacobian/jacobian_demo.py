"""Derivatives of derivatives in training: a vision transformer whose outputs are asked not to change when its input
changes a little. The penalty is |J v|², J the Jacobian of the logits by the pixels and v a random direction (Hoffman,
Roberts and Yaida 2019, "Robust Learning with Jacobian Regularization"): J v comes from one forward-mode pass, and the
penalty's gradient from going backward through that pass, which no other fused attention can do.

    python examples/digits_jacobian/jacobian_demo.py

trains on scikit-learn's digits without and with the penalty, and shows how both bear noise in the test images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jvp
from tqdm import tqdm

from torch_attn import replace_mha

sys.path.insert(0, str(Path(__file__).parents[1] / "digits_vit"))
from model import VisionTransformer  # noqa: E402
from training import BATCH_SIZE, Digits, predict  # noqa: E402

NOISES = [0.0, 0.25, 0.5, 0.75, 1.0]  # standard deviations; pixels lie in [-1, 1]


class LayerNorm(nn.LayerNorm):
    """The parent's, in operations that can be differentiated backward through forward mode. The gradient that torch
    2.13's fused layer norm gives there is wrong: it differs from finite differences.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


def make_model(**sizes: int) -> VisionTransformer:
    model = VisionTransformer(**sizes)
    replace_mha(model)
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
    return model


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Cross entropy plus weight · |J v|², v of unit length, as its mean over the batch."""
    if weight == 0:
        return nn.functional.cross_entropy(model(images), labels)
    direction = nn.functional.normalize(torch.randn_like(images).flatten(1)).view_as(images)
    logits, change = jvp(model, (images,), (direction,))
    return nn.functional.cross_entropy(logits, labels) + weight * change.square().sum(1).mean()


def train(digits: Digits, weight: float, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    steps = len(digits.train_labels) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * steps)
    model.train()
    with tqdm(total=epochs * steps, desc=f"penalty {weight:g}", unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.train_labels))[: steps * BATCH_SIZE].split(BATCH_SIZE):
                loss = loss_of(model, digits.train_images[batch], digits.train_labels[batch], weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model


def accuracies(model: nn.Module, digits: Digits, seed: int) -> list[float]:
    """On the test images, with each of NOISES added."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(digits.test_images.shape, generator=generator)
    return [
        (predict(model, digits.test_images + level * noise) == digits.test_labels).float().mean().item()
        for level in NOISES
    ]


def draw(plain: list[float], penalised: list[float], weight: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(NOISES, plain, marker="o", label="cross entropy alone")
    axis.plot(NOISES, penalised, marker="o", label=f"with the Jacobian penalty, weight {weight:g}")
    axis.set_xlabel("standard deviation of the noise added to test images with pixels in [-1, 1]")
    axis.set_ylabel("test accuracy")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains digits with and without a Jacobian penalty.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--weight", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args()
    digits = Digits.load()
    results = []
    for weight in (0.0, options.weight):
        results.append(accuracies(train(digits, weight, options.epochs, options.seed), digits, options.seed))
    print(f"\nnoise   plain     penalty {options.weight:g}")
    for level, plain, penalised in zip(NOISES, *results, strict=True):
        print(f"{level:5.2f}   {plain:6.1%}    {penalised:6.1%}")
    means = [sum(r[1:]) / len(r[1:]) for r in results]
    print(f"\nmean test accuracy under noise: {means[0]:.1%} plain, {means[1]:.1%} with the penalty")
    picture = options.out / "noise.png"
    draw(*results, options.weight, picture)
    print(f"figure: {picture}")


if __name__ == "__main__":
    main()
