"""The digits, and the loop that trains a model on them; the same for both sides of the demo."""

import time
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

BATCH_SIZE = 48
LEARNING_RATE = 5e-4  # four times as much learns too, but unsteadily: rounding then grows into the second digit


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels, as float images in [-1, 1]; a fifth is for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(digits.target)
        train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
        return cls(images[train], labels[train], images[test], labels[test])


@dataclass
class History:
    """What one training run reports: an entry an epoch, and the seconds of the whole."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return model(images).argmax(dim=1)


def train(model: nn.Module, digits: Digits, epochs: int, seed: int, label: str) -> History:
    """Train with AdamW on a one-cycle learning rate; the seed fixes the order of the images."""
    steps = len(digits.train_labels) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    order = torch.Generator().manual_seed(seed)
    history = History()
    start = time.perf_counter()
    with tqdm(total=epochs * steps, desc=label, unit="step") as bar:
        for _ in range(epochs):
            model.train()
            shuffled = torch.randperm(len(digits.train_labels), generator=order)
            total = 0.0
            for batch in shuffled[: steps * BATCH_SIZE].split(BATCH_SIZE):
                loss = nn.functional.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update()
            right = predict(model, digits.test_images) == digits.test_labels
            history.loss.append(total / steps)
            history.accuracy.append(right.float().mean().item())
            bar.set_postfix(loss=f"{history.loss[-1]:.4f}", test_accuracy=f"{history.accuracy[-1]:.1%}", refresh=False)
    history.seconds = time.perf_counter() - start
    return history
