"""Metrics of visual dialog against numbers worked out by hand."""

import numpy as np
import pytest

from vlm.evaluation.metrics import dialog

SCORES = np.array([[0.1, 0.9, 0.5], [0.4, 0.4, 0.4], [3.0, 2.0, 1.0]])


def test_places_and_what_they_sum_up_to():
    assert dialog.places(SCORES).tolist() == [[3, 1, 2], [1, 2, 3], [1, 2, 3]]
    found = dialog.right_places(SCORES, np.array([2, 0, 0]))
    assert found.tolist() == [2, 3, 1]  # equal scores count against the right one
    assert dialog.summary(found, (1, 2)) == pytest.approx(
        {"mrr": (1 / 2 + 1 / 3 + 1) / 3, "r1": 1 / 3, "r2": 2 / 3, "mean_rank": 2.0}
    )
    twice = dialog.summary(found, (1,), np.array([0, 0, 2]))
    assert twice == {"mrr": 1.0, "r1": 1.0, "mean_rank": 1.0}


def test_discounted_gain_of_as_many_candidates_as_are_relevant():
    relevance = np.array([0.0, 1.0, 0.5])
    assert dialog.ndcg(np.array([0.1, 0.9, 0.5]), relevance) == pytest.approx(1.0)
    ideal = 1 + 0.5 / np.log2(3)
    assert dialog.ndcg(np.array([0.9, 0.5, 0.1]), relevance) == pytest.approx((1 / np.log2(3)) / ideal)
    with pytest.raises(ValueError, match="at least one relevant option"):
        dialog.ndcg(SCORES[0], np.zeros(3))
