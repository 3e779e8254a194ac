"""Bootstrap intervals: repeatable, of the right width, by clusters."""

import numpy as np
import pytest

from vlm.evaluation.bootstrap import intervals


def test_width_of_a_proportion():
    hits = np.arange(1000) < 600
    (low, high) = intervals(lambda w: {"x": float(np.average(hits, weights=w))}, 1000)["x"]
    half = 1.96 * np.sqrt(0.6 * 0.4 / 1000)
    assert low == pytest.approx(0.6 - half, abs=0.006) and high == pytest.approx(0.6 + half, abs=0.006)


def test_the_seed_decides():
    def mean(w):
        return {"x": float(w @ np.arange(50) / 50)}

    assert intervals(mean, 50) == intervals(mean, 50) != intervals(mean, 50, seed=1)


def test_clusters_are_drawn_whole():
    # Ten identical observations per cluster: the interval is that of 20 observations, not of 200.
    values = np.random.default_rng(0).normal(size=20)
    (low, high) = intervals(lambda w: {"x": float(np.average(values.repeat(10), weights=w.repeat(10)))}, 20)["x"]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(20), rel=0.15)


def test_nothing_to_resample():
    assert intervals(lambda w: {"x": 1.0}, 1) == {} == intervals(lambda w: {"x": 1.0}, 9, resamples=0)
    assert intervals(lambda w: {"x": float("nan")}, 9, resamples=3) == {}
