"""Three looks at which measurements matter: what the model attends, what it misses when a column is shuffled, and what
it misses when the most important ones are taken away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torch_attn
from feature_model import FeatureModel, right

SHUFFLES = 10


@torch.no_grad()
def attention_importance(model: FeatureModel, values: Tensor) -> Tensor:
    """(features,), which sum to 1: the attention that each feature gets from the class token.

    The mean over tumours, heads and layers, as in section 5.3 of Gorishniy et al. 2021; the class token's attention to
    itself is left out.
    """
    with torch_attn.record_attention(model, queries=[0], reduce="mean") as record:
        model(values)
    return _of_features(torch.stack(record.last_maps())[:, :, 0])


@torch.no_grad()
def column_sums(model: FeatureModel, values: Tensor) -> Tensor:
    """(features,), which sum to 1: the attention that each feature gets from all tokens, not the class token alone.

    In the last layer only the class token is read, so that most of what is summed there changes no answer.
    """
    with torch_attn.record_attention(model, statistics=["column_sum"], reduce="mean") as record:
        model(values)
    return _of_features(torch.stack([kept["column_sum"][0] for kept in record.statistics.values()]))


def _of_features(x: Tensor) -> Tensor:
    """(layers, heads, 1 + features), the class token first, to shares of the features."""
    of_features = x.mean((0, 1))[1:]
    return of_features / of_features.sum()


@torch.no_grad()
def permutation_importance(model: FeatureModel, values: Tensor, malignant: Tensor, seed: int) -> Tensor:
    """(features,): how much the cross entropy rises when a column is shuffled among the tumours (Breiman 2001,
    "Random Forests", section 10), the mean of SHUFFLES shuffles. 0 or less: the model does not miss it.
    """
    generator = torch.Generator().manual_seed(seed)
    of_all = nn.functional.binary_cross_entropy_with_logits(model(values), malignant)
    rises = torch.empty(values.size(1))
    for feature in range(values.size(1)):
        shuffled = values.repeat(SHUFFLES, 1, 1)
        for copy in shuffled:
            copy[:, feature] = copy[torch.randperm(len(copy), generator=generator), feature]
        loss = nn.functional.binary_cross_entropy_with_logits(model(shuffled.flatten(0, 1)), malignant.repeat(SHUFFLES))
        rises[feature] = loss - of_all
    return rises


def accuracy_without(model: FeatureModel, values: Tensor, malignant: Tensor, features: Tensor) -> float:
    """When these features (a tensor of their places) hold their mean over the training rows, which is 0."""
    values = values.clone()
    values[:, features] = 0
    return right(model, values, malignant).float().mean().item()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, of two vectors without ties: the correlation of the ranks, 1 for the same order."""
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def in_a_model(rows: Tensor, others: Tensor) -> float:
    """The mean rank correlation of two importances found in the same model: of row i of one with row i of the other."""
    return sum(map(rank_correlation, rows, others)) / len(rows)


def agreement(rows: Tensor) -> float:
    """The mean rank correlation of every two rows, such as the importances found in two folds."""
    pairs = torch.combinations(torch.arange(len(rows)))
    return sum(rank_correlation(rows[i], rows[j]) for i, j in pairs.tolist()) / len(pairs)
