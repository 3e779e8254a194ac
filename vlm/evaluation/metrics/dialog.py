"""Metrics of visual dialog: where the right one of the candidate answers is placed (Das et al. 2017, section 5.2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def places(scores: Float[np.ndarray, "n a"]) -> Int[np.ndarray, "n a"]:
    """The place of every candidate, 1 for the highest score; of equal scores the earlier candidate comes first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    found = np.empty(order.shape, np.int64)
    np.put_along_axis(found, order, np.arange(1, scores.shape[1] + 1)[None], axis=1)
    return found


def right_places(scores: Float[np.ndarray, "n a"], right: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The place of the right candidate; those with an equal score stand before it."""
    return np.count_nonzero(scores >= np.take_along_axis(scores, right[:, None], axis=1), axis=1)


def summary(
    found: Int[np.ndarray, " n"], k: tuple[int, ...] = (1, 5, 10), weights: np.ndarray | None = None
) -> dict[str, float]:
    """Mean reciprocal rank, shares of places up to each of `k`, and the mean place."""
    recalls = {f"r{depth}": float(np.average(found <= depth, weights=weights)) for depth in k}
    mean = float(np.average(found, weights=weights))
    return {"mrr": float(np.average(1 / found, weights=weights)), **recalls, "mean_rank": mean}


def ndcg(scores: Float[np.ndarray, " a"], relevance: Float[np.ndarray, " a"]) -> float:
    """Discounted gain of the first K candidates over the best possible one; K are those that are relevant at all.

    Raises:
        ValueError: none is.
    """
    count = np.count_nonzero(relevance)
    if not count:
        raise ValueError("relevance: expected at least one relevant option, found none")
    discount = 1 / np.log2(np.arange(count) + 2)
    order = np.argsort(-scores, kind="stable")[:count]
    return float(relevance[order] @ discount / (np.sort(relevance)[::-1][:count] @ discount))
