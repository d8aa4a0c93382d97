"""The task: one of scikit-learn's digits at a random place of a large canvas, among pieces of other digits.

Canvases are drawn anew for every batch. The test digits never occur in training, neither whole nor in pieces.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CANVAS = 32  # pixels a side
DIGIT = 8
PIECE = 4
PIECES = 6  # of clutter on a canvas


@dataclass
class Canvases:
    """images (N, 1, CANVAS, CANVAS) in [0, 1]; labels (N); corners (N, 2), row and column where the digit begins."""

    images: Tensor
    labels: Tensor
    corners: Tensor


class Painter:
    """Paints canvases from the training digits, or from the fifth of the 1,797 that is for testing."""

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        halves = train_test_split(range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        rows = halves[0 if train else 1]
        self.digits = torch.tensor(digits.images[rows], dtype=torch.float32) / 16
        self.labels = torch.tensor(digits.target[rows])

    def batch(self, size: int, generator: torch.Generator) -> Canvases:
        """Canvases of digits drawn at random."""
        return self.paint(torch.randint(len(self.labels), (size,), generator=generator), generator)

    def every_digit(self, times: int, seed: int) -> Canvases:
        """Each digit on ``times`` canvases: the same ones whenever the seed is."""
        rows = torch.arange(len(self.labels)).repeat(times)
        return self.paint(rows, torch.Generator().manual_seed(seed))

    def paint(self, rows: Tensor, generator: torch.Generator) -> Canvases:
        """A canvas for each of the digits ``rows``. Where things overlap, the brighter pixel shows."""
        images = torch.zeros(len(rows), CANVAS, CANVAS)

        def corners(side: int, margin: int) -> Tensor:
            return torch.randint(side - margin + 1, (len(rows), 2), generator=generator)

        for _ in range(PIECES):
            source = self.digits[torch.randint(len(self.digits), (len(rows),), generator=generator)]
            piece = source[_window(corners(DIGIT, PIECE), PIECE)]
            _paste(images, piece, corners(CANVAS, PIECE))
        places = corners(CANVAS, DIGIT)
        _paste(images, self.digits[rows], places)
        return Canvases(images.unsqueeze(1), self.labels[rows], places)


def _window(corners: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (N, side, side) of a square in each image."""
    steps = torch.arange(side)
    image = torch.arange(len(corners)).view(-1, 1, 1)
    return image, (corners[:, :1] + steps).unsqueeze(2), (corners[:, 1:] + steps).unsqueeze(1)


def _paste(images: Tensor, pixels: Tensor, corners: Tensor) -> None:
    where = _window(corners, pixels.size(-1))
    images[where] = torch.maximum(images[where], pixels)
