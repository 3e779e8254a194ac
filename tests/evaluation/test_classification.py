"""Classification metrics against scikit-learn and hand-computed tables."""

import numpy as np
import pytest
from sklearn import metrics as sk

from vlm.evaluation import classification as c


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 200)
    scores = rng.normal(size=(200, 8)) + 1.5 * np.eye(8)[labels]
    return scores, labels  # class 7 never occurs


def test_accuracy_equals_sklearn(case):
    scores, labels = case
    ranks = c.label_ranks(scores, labels)
    for k in (1, 3, 5):
        assert c.accuracy(ranks, k) == pytest.approx(sk.top_k_accuracy_score(labels, scores, k=k, labels=range(8)))


def test_mean_per_class_recall_is_balanced_accuracy(case):
    scores, labels = case
    ranks = c.label_ranks(scores, labels)
    scores[:, 7] = -9.0  # scikit-learn warns where a class is predicted that never occurs
    expected = sk.balanced_accuracy_score(labels, scores.argmax(1))
    ranks = c.label_ranks(scores, labels)
    assert c.mean_per_class_recall(ranks, labels, 8) == pytest.approx(expected)
    assert np.isnan(c.class_recall(ranks, labels, 8)[7])


def test_equal_scores_are_placed_in_class_order():
    scores = np.array([[1.0, 1.0, 0.0]] * 3)
    np.testing.assert_array_equal(c.label_ranks(scores, np.array([0, 1, 2])), [0, 1, 2])


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="found 1 others"):
        c.label_ranks(np.array([[np.nan, 0.0]]), np.array([0]))


def test_weights_count_examples_several_times(case):
    scores, labels = case
    times = np.random.default_rng(1).integers(0, 4, len(labels))
    again = np.repeat(np.arange(len(labels)), times)
    ranks, weights = c.label_ranks(scores, labels), times.astype(float)
    assert c.accuracy(ranks, 1, weights) == pytest.approx(c.accuracy(ranks[again], 1))
    assert c.mean_per_class_recall(ranks, labels, 8, weights) == pytest.approx(
        c.mean_per_class_recall(ranks[again], labels[again], 8)
    )


def test_weights_of_average_precision(case):
    scores, labels = case
    times, relevant = np.random.default_rng(1).integers(0, 4, len(labels)), labels == 3
    ours = c.average_precision(scores[:, 3], relevant, points=None, weights=times)
    assert ours == pytest.approx(sk.average_precision_score(relevant, scores[:, 3], sample_weight=times))
    kept = times > 0
    ours = c.average_precision(scores[:, 3], relevant, weights=kept)
    assert ours == pytest.approx(c.average_precision(scores[kept, 3], relevant[kept]))


def test_average_precision_without_points_equals_sklearn(case):
    scores, labels = case
    relevant = labels == 2
    expected = sk.average_precision_score(relevant, scores[:, 2])
    assert c.average_precision(scores[:, 2], relevant, points=None) == pytest.approx(expected)


def test_eleven_point_average_precision_by_hand():
    # Precision at the three hits: 1/1, 2/3, 3/6. Recall 0 to .3 → 1, .4 to .6 → 2/3, .7 to 1 → 1/2.
    scores = np.array([6.0, 5, 4, 3, 2, 1])
    relevant = np.array([1, 0, 1, 0, 0, 1], bool)
    assert c.average_precision(scores, relevant) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 0.5) / 11)


def test_eleven_point_recall_levels_are_reached_exactly():
    # Ten relevant: recall 0.3 is reached by the third hit, although 3 / 10 < 0.3 or 0.1 * 3 > 0.3 in binary.
    relevant = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], bool)
    tail = 10 / 17
    expected = (4 * 1 + 7 * tail) / 11
    assert c.average_precision(-np.arange(17.0), relevant) == pytest.approx(expected)


def test_ties_place_relevant_examples_last():
    assert c.average_precision(np.zeros(2), np.array([True, False]), points=None) == 0.5


def test_classes_without_relevant_examples_are_left_out():
    relevant = np.array([[True, False], [False, False]])
    assert c.mean_average_precision(np.array([[1.0, 0], [0, 1]]), relevant) == 1.0
    assert np.isnan(c.mean_average_precision(np.zeros((2, 2)), np.zeros((2, 2), bool)))


def test_confusion_counts_right_by_predicted():
    np.testing.assert_array_equal(c.confusion(np.array([1, 1, 0]), np.array([0, 1, 0]), 2), [[1, 1], [0, 1]])
