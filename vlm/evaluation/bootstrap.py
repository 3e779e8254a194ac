"""Confidence intervals by resampling clusters with replacement (Efron 1979, the percentile method)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

Statistic = Callable[[Float[np.ndarray, " n"]], Mapping[str, float]]


def intervals(
    statistic: Statistic, clusters: int, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns {metric: (low, high)} of every metric.

    Args:
      statistic: how often each cluster counts, float64[n] with sum n → metrics. A cluster is what was drawn when the
        data was collected: an image together with all its texts.
      clusters: n. With fewer than two there is nothing to resample and the result is empty.
      resamples, level, seed: number of draws, coverage, and what makes them repeatable.
    """
    if clusters < 2 or resamples < 1:
        return {}
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {}
    for _ in range(resamples):
        counts = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters).astype(np.float64)
        for name, value in statistic(counts).items():
            draws.setdefault(name, []).append(value)
    tail = (1 - level) / 2
    found = {
        name: np.nanquantile(values, (tail, 1 - tail)) for name, values in draws.items() if np.isfinite(values).any()
    }
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}
