"""The task: one of scikit-learn's digits at a random place of a large canvas, among pieces of other digits.

Canvases are drawn anew for every batch; the test digits are never seen in training, neither whole nor in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CANVAS = 32  # pixels a side; a digit has 8
DIGIT = 8
PIECES = 6  # of clutter on a canvas
PIECE = 4


@dataclass
class Canvases:
    """images (N, 1, CANVAS, CANVAS) in [0, 1]; labels (N); corners (N, 2), the row and column of the digit's first pixel."""

    images: Tensor
    labels: Tensor
    corners: Tensor


class DigitsOnCanvas:
    """Draws canvases from one half of the digits: a fifth of the 1,797 is for testing."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        rows = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        rows = rows[0 if train else 1]
        self.digits = torch.tensor(digits.images[rows], dtype=torch.float32) / 16
        self.labels = torch.tensor(digits.target[rows])

    def draw(self, rows: Tensor, generator: torch.Generator) -> Canvases:
        """A canvas for each of the given digits. Clutter lies below: where it meets the digit the brighter pixel shows."""
        count = len(rows)
        images = torch.zeros(count, CANVAS, CANVAS)

        def random(high: int, *sizes: int) -> Tensor:
            return torch.randint(high, sizes, generator=generator)

        sources = random(len(self.digits), count, PIECES)
        cuts = random(DIGIT - PIECE + 1, count, PIECES, 2)
        places = random(CANVAS - PIECE + 1, count, PIECES, 2)
        for piece in range(PIECES):
            pixels = _window(self.digits[sources[:, piece]], cuts[:, piece], PIECE)
            _paste(images, pixels, places[:, piece])
        corners = random(CANVAS - DIGIT + 1, count, 2)
        _paste(images, self.digits[rows], corners)
        return Canvases(images.unsqueeze(1), self.labels[rows], corners)


def _indices(images: Tensor, corners: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    steps = torch.arange(side)
    batch = torch.arange(len(images)).view(-1, 1, 1)
    return batch, (corners[:, :1] + steps).unsqueeze(2), (corners[:, 1:] + steps).unsqueeze(1)


def _window(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """(N, side, side) at each image's own corner."""
    return images[_indices(images, corners, side)]


def _paste(images: Tensor, pixels: Tensor, corners: Tensor) -> None:
    where = _indices(images, corners, pixels.size(-1))
    images[where] = torch.maximum(images[where], pixels)
