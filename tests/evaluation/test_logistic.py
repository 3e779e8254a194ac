"""Logistic regression against scikit-learn, and the penalty sweep."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vlm.evaluation import logistic


def data(classes=4, count=120, width=6):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    centres = rng.normal(size=(classes, width))
    return (centres[labels] + rng.normal(size=(count, width))).astype(np.float32), labels


@pytest.mark.parametrize("penalty", [1e-2, 1.0, 100.0])
def test_equals_sklearn(penalty):
    features, labels = data()
    kernel, bias = logistic.fit(features, labels, 4, penalty)
    model = LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8).fit(features.astype(np.float64), labels)
    np.testing.assert_allclose(kernel - kernel.mean(1, keepdims=True), model.coef_.T, atol=3e-3)
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_, atol=3e-3)


def test_sklearn_solver_gives_the_same_scores_for_two_classes():
    features, labels = data(2)
    ours, theirs = (f(features, labels, 2, 1.0) for f in (logistic.fit, logistic.fit_sklearn))
    scores = [features @ kernel + bias for kernel, bias in (ours, theirs)]
    centred = [s - s.mean(1, keepdims=True) for s in scores]
    np.testing.assert_allclose(*centred, atol=2e-2)


def test_sklearn_solver_never_predicts_an_absent_class():
    features, labels = data()
    kernel, bias = logistic.fit_sklearn(features, np.where(labels == 2, 3, labels), 5, 1.0)
    predictions = set(np.argmax(features @ kernel + bias, axis=1).tolist())
    assert predictions == {0, 1, 3}


def test_sweep_finds_the_best_of_the_grid():
    best = logistic.SWEEP[37]
    penalty, seen = logistic.sweep(lambda value: -abs(np.log(value / best)))
    assert penalty == best and len(seen) < 20 and len(logistic.SWEEP) == 97


def test_sweep_prefers_the_larger_of_equal_penalties():
    assert logistic.sweep(lambda value: 1.0)[0] == logistic.SWEEP[-1]
