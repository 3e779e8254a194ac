"""Metrics of labels equal scikit-learn's and scipy's, with ties, weights and degenerate data."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from vlm.evaluation.metrics import labels as ours

SEEDS = range(6)


def draw(seed, classes=2, n=40):
    rng = np.random.default_rng(seed)
    right = rng.integers(classes, size=n)
    said = np.where(rng.random(n) < 0.6, right, rng.integers(classes, size=n))
    return said, right, rng.integers(0, 4, n), np.round(rng.normal(size=n) + right, 1)  # ties among the scores


@pytest.mark.parametrize("seed", SEEDS)
def test_f1_and_matthews_equal_scikit_learn(seed):
    said, right, weights, _ = draw(seed)
    for w in (None, weights):
        assert ours.f1(said, right, weights=w) == pytest.approx(sklearn.f1_score(right, said, sample_weight=w))
        expected = sklearn.f1_score(right, said, pos_label=0, sample_weight=w)
        assert ours.f1(said, right, 0, w) == pytest.approx(expected)
    for classes in (2, 4):
        said, right, weights, _ = draw(seed, classes)
        for w in (None, weights):
            expected = sklearn.matthews_corrcoef(right, said, sample_weight=w)
            assert ours.matthews(said, right, w) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_correlations_equal_scipy(seed):
    _, right, weights, scores = draw(seed, classes=5)
    values = right + 0.5
    assert ours.pearson(scores, values) == pytest.approx(stats.pearsonr(scores, values)[0], abs=1e-12)
    assert ours.spearman(scores, values) == pytest.approx(stats.spearmanr(scores, values)[0], abs=1e-12)
    np.testing.assert_allclose(ours.ranks(scores), stats.rankdata(scores))
    copies = np.repeat(scores, weights), np.repeat(values, weights)
    assert ours.pearson(scores, values, weights) == pytest.approx(stats.pearsonr(*copies)[0], abs=1e-12)
    assert ours.spearman(scores, values, weights) == pytest.approx(stats.spearmanr(*copies)[0], abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_area_under_the_curve_equals_scikit_learn(seed):
    _, right, weights, scores = draw(seed)
    assert ours.auroc(scores, right) == pytest.approx(sklearn.roc_auc_score(right, scores))
    expected = sklearn.roc_auc_score(right, scores, sample_weight=weights)
    assert ours.auroc(scores, right, weights) == pytest.approx(expected)
    assert ours.auroc(np.zeros(len(right)), right) == 0.5 and ours.auroc(right.astype(float), right) == 1.0


def test_degenerate_data():
    none, some = np.zeros(4, int), np.array([0, 1, 0, 1])
    assert ours.f1(none, none) == sklearn.f1_score(none, none, zero_division=0) == 0.0
    assert ours.f1(none, some) == ours.f1(some, none) == 0.0 and ours.f1(some, some) == 1.0
    assert ours.matthews(none, some) == sklearn.matthews_corrcoef(some, none) == 0.0
    assert ours.matthews(none, none) == 0.0 and ours.matthews(1 - some, some) == -1.0
    for metric in (ours.pearson, ours.spearman):
        assert math.isnan(metric(np.full(4, 0.1), some)) and math.isnan(metric(some[:1], some[:1]))
        assert metric(some, 2.0 * some + 1) == pytest.approx(1.0) and metric(-some, some) == pytest.approx(-1.0)
        assert math.isnan(metric(some, some, np.array([3, 0, 1, 0])))  # what is left is constant
    assert ours.pearson(1e-200 * some, some) == pytest.approx(1.0)
    assert math.isnan(ours.auroc(np.arange(4.0), none)) and math.isnan(ours.auroc(np.arange(4.0), none + 1))
