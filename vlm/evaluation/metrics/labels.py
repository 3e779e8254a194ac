"""Metrics of predicted labels and values: F1, Matthews, Pearson and Spearman correlation, area under the ROC curve.

They equal scikit-learn's and scipy's. `weights` say how often each example counts (bootstrap resamples); examples that
never count are as if they were not there.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Shaped

Classes = Int[np.ndarray, " n"]
Values = Shaped[np.ndarray, " n"]
Weights = Shaped[np.ndarray, " n"]


def f1(predictions: Classes, labels: Classes, positive: int = 1, weights: Weights | None = None) -> float:
    """Harmonic mean of precision and recall of one class; 0 where it is neither predicted nor right anywhere."""
    said, right = predictions == positive, labels == positive
    weights = _weights(weights, labels)
    both, either = weights[said & right].sum(), weights[said].sum() + weights[right].sum()
    return float(2 * both / either) if either else 0.0


def matthews(predictions: Classes, labels: Classes, weights: Weights | None = None) -> float:
    """Matthews correlation of any number of classes (Gorodkin 2004); 0 where either side has a single class."""
    weights = _weights(weights, labels)
    classes, numbers = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    said, right = numbers[: len(labels)], numbers[len(labels) :]
    count, total = len(classes), weights.sum()
    predicted = np.bincount(said, weights, count)
    actual = np.bincount(right, weights, count)
    hits = weights[said == right].sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - actual @ actual)
    return float((hits * total - predicted @ actual) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(a: Values, b: Values, weights: Weights | None = None) -> float:
    """Linear correlation of two lists of values; NaN where one of them is constant or there are fewer than two."""
    a, b, weights = np.asarray(a, np.float64), np.asarray(b, np.float64), _weights(weights, a)
    a, b, weights = a[weights > 0], b[weights > 0], weights[weights > 0]
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    a, b = a - np.average(a, weights=weights), b - np.average(b, weights=weights)
    a, b = a / np.abs(a).max(), b / np.abs(b).max()  # squares of tiny values would vanish
    product = (weights * a * b).sum() / np.sqrt((weights * a * a).sum() * (weights * b * b).sum())
    return float(np.clip(product, -1, 1))


def spearman(a: Values, b: Values, weights: Weights | None = None) -> float:
    """Linear correlation of ranks; equal values share the mean of their ranks."""
    return pearson(ranks(a, weights), ranks(b, weights), weights)


def auroc(scores: Values, labels: Classes, weights: Weights | None = None) -> float:
    """Area under the ROC curve: how often a positive (1) scores above a negative (0), ties counting half.

    NaN where one of the two classes is absent.
    """
    weights, positive = _weights(weights, labels), np.asarray(labels) == 1
    wins, losses = weights[positive].sum(), weights[~positive].sum()
    if not wins or not losses:
        return float("nan")
    # The positives' mean rank among all, less the mean rank among themselves, is the number of negatives below.
    own = wins * (wins + 1) / 2
    return float(((weights * ranks(scores, weights))[positive].sum() - own) / (wins * losses))


def ranks(values: Values, weights: Weights | None = None) -> Float[np.ndarray, " n"]:
    """Places from 1 in ascending order, equal values in the middle of their places; of `weights` copies of each."""
    _, numbers = np.unique(np.asarray(values), return_inverse=True)
    copies = np.bincount(numbers, _weights(weights, values))
    return (np.cumsum(copies) - (copies - 1) / 2)[numbers]


def _weights(weights: Weights | None, like: Values) -> Float[np.ndarray, " n"]:
    return np.ones(len(like)) if weights is None else np.asarray(weights, np.float64)
