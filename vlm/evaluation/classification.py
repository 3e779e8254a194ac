"""Metrics of classification by scores, as pure functions of NumPy arrays."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Scores = Float[np.ndarray, "n c"]
Labels = Int[np.ndarray, " n"]
Weights = Shaped[np.ndarray, " n"]  # counts, shares or flags


def label_ranks(scores: Scores, labels: Labels) -> Int[np.ndarray, " n"]:
    """How many classes are placed before the right one, 0 being best; equal scores are placed in order of class.

    Raises:
      ValueError: a score is not finite, which would compare as neither better nor worse.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: expected finite numbers, found {int((~np.isfinite(scores)).sum())} others")
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None, :] < labels[:, None]
    return ((scores > right) | ((scores == right) & earlier)).sum(axis=1)


def accuracy(ranks: Int[np.ndarray, " n"], k: int = 1, weights: Weights | None = None) -> float:
    """Share of examples whose right class is among the first k."""
    return float(np.average(ranks < k, weights=weights))


def class_recall(
    ranks: Int[np.ndarray, " n"], labels: Labels, num_classes: int, weights: Weights | None = None
) -> Float[np.ndarray, " c"]:
    """Top-1 accuracy within each class; NaN for a class without examples."""
    weights = np.ones(len(labels)) if weights is None else weights
    count = np.bincount(labels, weights=weights, minlength=num_classes)
    right = np.bincount(labels, weights=weights * (ranks < 1), minlength=num_classes)
    return np.divide(right, count, out=np.full(num_classes, np.nan), where=count > 0)


def mean_per_class_recall(
    ranks: Int[np.ndarray, " n"], labels: Labels, num_classes: int, weights: Weights | None = None
) -> float:
    """Mean of `class_recall` over the classes that occur (balanced accuracy)."""
    return float(np.nanmean(class_recall(ranks, labels, num_classes, weights)))


def average_precision(
    scores: Float[np.ndarray, " n"],
    relevant: Bool[np.ndarray, " n"],
    *,
    points: int | None = 11,
    weights: Weights | None = None,
) -> float:
    """Average precision of one class.

    Args:
      points: 11 averages the best precision at recall ≥ 0, 0.1, … 1 (VOC 2007, Everingham et al. 2010, section 4.2);
        None is the mean precision at each relevant example.
      weights: how often each example counts.

    Returns:
      NaN where nothing is relevant. Among equal scores the relevant ones are placed last.
    """
    order = np.lexsort((relevant, -scores))
    weights = (np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64))[order]
    hits = relevant[order] * weights
    total = hits.sum()
    if total == 0:
        return float("nan")
    found = np.cumsum(hits)
    precision = found / np.maximum(np.cumsum(weights), 1e-300)
    if points is None:
        return float((precision * hits).sum() / total)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    # Counts are compared, not ratios: 3 of 10 reaches recall 0.3 exactly.
    levels = np.arange(points) * total / (points - 1)
    first = np.searchsorted(found, levels * (1 - 1e-12))
    return float(best[np.minimum(first, len(best) - 1)].mean())


def mean_average_precision(
    scores: Scores, relevant: Bool[np.ndarray, "n c"], *, points: int | None = 11, weights: Weights | None = None
) -> float:
    """Mean of `average_precision` over the classes that have a relevant example."""
    columns = (
        average_precision(scores[:, c], relevant[:, c], points=points, weights=weights) for c in range(scores.shape[1])
    )
    values = np.fromiter(columns, np.float64)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def confusion(predictions: Labels, labels: Labels, num_classes: int) -> Int[np.ndarray, "c c"]:
    """Counts [right class, predicted class]."""
    return np.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)
