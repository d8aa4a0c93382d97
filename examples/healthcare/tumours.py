"""The data: scikit-learn's table of breast tumours (Street, Wolberg and Mangasarian 1993), in five folds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

FOLDS = 5


@dataclass
class Fold:
    """values (N, 30), with mean 0 and variance 1 over the training rows; malignant (N,), 0 or 1."""

    train_values: Tensor
    train_malignant: Tensor
    test_values: Tensor
    test_malignant: Tensor


class Tumours:
    """569 tumours, 30 measurements of each one's cell nuclei; 212 are malignant."""

    def __init__(self) -> None:
        table = load_breast_cancer()
        self.names = [str(name) for name in table.feature_names]
        self.values = torch.tensor(table.data, dtype=torch.float32)
        self.malignant = torch.tensor(table.target == 0, dtype=torch.float32)

    def folds(self, seed: int) -> Iterator[Fold]:
        """Each tumour is tested in one fold, by a model that was trained on the other four."""
        split = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        for train, test in split.split(self.values, self.malignant):
            mean, deviation = self.values[train].mean(0), self.values[train].std(0)
            values = (self.values - mean) / deviation
            yield Fold(values[train], self.malignant[train], values[test], self.malignant[test])
