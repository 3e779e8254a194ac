"""Retrieval metrics: the official tool's numbers, brute force, ties."""

import json
import resource
import time

import numpy as np
import pytest

from vlm.evaluation import retrieval


def brute_force(image, text, text_image):
    """Places by sorting whole lists, the right ones last among equals."""
    s = image.astype(np.float64) @ text.astype(np.float64).T
    t2i = [sum(s[i, t] >= s[j, t] for i in range(len(image)) if i != j) for t, j in enumerate(text_image)]
    i2t, own = [], np.zeros(len(text), int)
    for i in range(len(image)):
        mine = text_image == i
        order = np.lexsort((mine, -s[i]))
        own_places = {t: place for place, t in enumerate(order) if mine[t]}
        i2t.append(min(own_places.values()))
        for t, place in own_places.items():
            own[t] = place
    return t2i, i2t, own


def test_equals_clip_benchmark(shared_data):
    golden = np.load(shared_data / "goldens" / "retrieval_clip_benchmark.npz")
    expected = json.loads(str(golden["expected"]))
    found = retrieval.recall(retrieval.ranks(golden["image"], golden["text"], golden["text_image_index"]))
    names = {
        "image_retrieval_recall": "text_to_image_recall",
        "text_retrieval_recall": "image_to_text_recall",
        "true_recall_text": "image_to_text_true_recall",
    }
    assert len(expected) == 9
    for name, value in expected.items():
        theirs, k = name.split("@")
        assert abs(found[f"{names[theirs]}@{k}"] - value) <= 1e-7
    recalls = [value for name, value in found.items() if "_recall@" in name and "true" not in name]
    assert found["mean_recall"] == pytest.approx(np.mean(recalls)) and len(recalls) == 6


@pytest.mark.parametrize("chunk", [1, 400, 1 << 20])
def test_equals_sorting_with_ties(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(0)
    # Few distinct vectors: many exact ties, also within one image's texts.
    image, text = rng.integers(-1, 2, (9, 3)).astype(np.float32), rng.integers(-1, 2, (30, 3)).astype(np.float32)
    text_image = np.concatenate([np.arange(9), rng.integers(0, 9, 21)])
    found = retrieval.ranks(image, text, text_image)
    t2i, i2t, own = brute_force(image, text, text_image)
    np.testing.assert_array_equal(found.text_to_image, t2i)
    np.testing.assert_array_equal(found.image_to_text, i2t)
    np.testing.assert_array_equal(np.sort(found.own_texts), np.sort(own))


def test_collapsed_embeddings_score_zero():
    """A model that maps everything to one point must not look perfect."""
    vector = np.full((20, 8), 8**-0.5, np.float32)
    found = retrieval.recall(retrieval.ranks(vector, vector, np.arange(20)))
    assert found["mean_recall"] == 0.0


def test_weights_count_images_with_their_texts():
    rng = np.random.default_rng(0)
    image, text_image = rng.normal(size=(12, 4)), np.repeat(np.arange(12), 2)
    text = image[text_image] + rng.normal(size=(24, 4))
    ranks = retrieval.ranks(image, text, text_image)
    weights = np.array([3.0] + [0.0] * 10 + [9.0])
    found = retrieval.recall(ranks, (1,), weights)
    assert found["text_to_image_recall@1"] == pytest.approx(
        (3 * (ranks.text_to_image[:2] < 1).mean() + 9 * (ranks.text_to_image[22:] < 1).mean()) / 12
    )
    assert (
        found["image_to_text_recall@1"] == (3 * (ranks.image_to_text[0] < 1) + 9 * (ranks.image_to_text[11] < 1)) / 12
    )


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_groups_equal_sorting(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK_BYTES", chunk)
    rng = np.random.default_rng(0)
    image, text = rng.integers(-1, 2, (12, 3)).astype(np.float32), rng.integers(-1, 2, (24, 3)).astype(np.float32)
    group, text_image = np.arange(12) % 4, np.repeat(np.arange(12), 2)
    s = image @ text.T
    right = group[:, None] == group[text_image][None, :]

    def place(scores, right):
        return (scores[~right] >= scores[right].max()).sum()

    found = retrieval.group_ranks(image, text, text_image, group)
    np.testing.assert_array_equal(found.text_to_image, [place(s[:, t], right[:, t]) for t in range(24)])
    np.testing.assert_array_equal(found.image_to_text, [place(s[i], right[i]) for i in range(12)])
    assert not any("true" in name for name in retrieval.recall(found))


def test_groups_of_one_are_the_usual_case():
    rng = np.random.default_rng(0)
    image, text, text_image = rng.normal(size=(9, 3)), rng.normal(size=(18, 3)), np.repeat(np.arange(9), 2)
    one, other = (
        retrieval.ranks(image, text, text_image),
        retrieval.group_ranks(image, text, text_image, np.arange(9)),
    )
    np.testing.assert_array_equal(one.text_to_image, other.text_to_image)
    np.testing.assert_array_equal(one.image_to_text, other.image_to_text)


def test_impossible_inputs_are_named():
    eye = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="1 images have no text, the first is 2"):
        retrieval.ranks(eye, eye[:2], np.array([0, 1]))
    with pytest.raises(ValueError, match="found 1 rows with others"):
        retrieval.ranks(np.where(eye == 1, np.nan, eye)[:1], eye[:1], np.array([0]))
    with pytest.raises(ValueError, match="one image per text"):
        retrieval._check(eye, eye, np.array([0, 1]))  # `ranks` itself: the annotated shapes refuse it before


def test_memory_does_not_grow_with_the_matrix():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2000, 64)).astype(np.float32), rng.normal(size=(20_000, 64)).astype(np.float32)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    retrieval.ranks(image, text, np.arange(20_000) % 2000)
    assert time.monotonic() - began < 20
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 0.8 * 2000 * 20_000 * 8  # the whole matrix in float64


def test_ranks_from_scores_equal_ranks_from_embeddings():
    rng = np.random.default_rng(1)
    image, text = rng.integers(-1, 2, (9, 3)).astype(np.float64), rng.integers(-1, 2, (30, 3)).astype(np.float64)
    text_image = np.concatenate([np.arange(9), rng.integers(0, 9, 21)])
    expected, found = (
        retrieval.ranks(image, text, text_image),
        retrieval.score_ranks(image @ text.T, text @ image.T, text_image),
    )
    for name in ("text_to_image", "image_to_text", "own_texts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_what_is_not_on_the_shortlist_comes_last():
    text_image = np.array([0, 0, 1])
    image_to_text = np.array([[-100, -100, 3.0], [-100, 2.0, 1.0]])
    text_to_image = np.array([[1.0, 2.0], [2.0, 1.0], [-100, -100]])
    found = retrieval.score_ranks(image_to_text, text_to_image, text_image)
    np.testing.assert_array_equal(found.text_to_image, [1, 0, 1])
    np.testing.assert_array_equal(found.image_to_text, [1, 1])
    with pytest.raises(ValueError, match=r"expected \[3, 2\] from texts to images, found \(2, 3\)"):
        retrieval.score_ranks(image_to_text, text_to_image.T, text_image)
    with pytest.raises(ValueError, match="NaN"):
        retrieval.score_ranks(image_to_text * np.nan, text_to_image, text_image)


def test_ranks_from_lists():
    found = retrieval.list_ranks([[2, 1], [2, 0, 1]], [[0, 1], [1, 0], []], np.array([0, 0, 1]))
    np.testing.assert_array_equal(found.text_to_image[:2], [0, 1])
    np.testing.assert_array_equal(found.image_to_text, [1, 0])
    metrics = retrieval.recall(found, (1, 2))
    assert metrics["text_to_image_recall@1"] == pytest.approx(1 / 3)
    assert metrics["text_to_image_recall@2"] == pytest.approx(2 / 3)  # a list without the image never finds it
    assert metrics["image_to_text_true_recall@2"] == pytest.approx((1 / 2 + 1) / 2)
