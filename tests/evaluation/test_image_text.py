"""Retrieval end to end on known embeddings."""

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.evaluation import retrieval
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Sampling
from vlm.evaluation.image_text import Retrieval, RetrievalConfig, texts_of

WORDS = ("red", "green", "blue", "yellow", "white")


def prepare(spec, **settings):
    config = RetrievalConfig(spec, **{"bootstrap": Sampling(20), "k": (1, 2), "pictures": 3} | settings)
    return Retrieval.prepare(config, "config.eval.pairs")


def test_metrics_equal_the_pure_functions(model, params, processor, colours):
    def texts(i):
        return [WORDS[i % 5], f"dark {WORDS[(i + 1) % 5]}", "photo " + WORDS[i % 5]][: 1 + i % 3]

    spec, _ = colours(count=20, noise=90, text=texts)
    embedder = Embedder(model, params, processor, batch_size=8)
    result = prepare(spec)(embedder)
    task = prepare(spec)
    images, notes = embedder.all_images(task.source, task.note)
    embeds = embedder.texts([text for note in notes for text in note["texts"]])
    text_image = np.concatenate([[i] * (1 + i % 3) for i in range(20)])
    assert result.metrics == retrieval.recall(retrieval.ranks(images, embeds, text_image), (1, 2))
    assert 0 < result.metrics["mean_recall"] < 1
    assert result.details["texts"] == len(text_image) and result.n == 20
    assert set(result.intervals) == set(result.metrics)
    rows = [row for row in result.examples if row["query"] == "text"]
    share = np.mean([row["rank"] == 1 for row in rows])
    assert share == pytest.approx(result.metrics["text_to_image_recall@1"]) and rows[0]["text"] == "red"
    assert len([row for row in result.examples if row["query"] == "image"]) == 20


def test_examples_on_the_page_are_right(model, params, processor, colours):
    spec, _ = colours(count=5, noise=0, text=lambda i: [WORDS[i], f"photo {WORDS[i]}"])
    result = prepare(spec, captions=1)(Embedder(model, params, processor))
    assert result.details["texts"] == 5 and result.metrics["mean_recall"] == 1.0
    queries = result.page["queries"]
    assert [q["index"] for q in queries["image_to_text"]] == [0, 2, 4]
    first = queries["image_to_text"][1]
    assert first["answers"][0][0] == "blue" and first["answers"][0][2] and first["rank"] == 1
    assert queries["text_to_image"][2]["text"] == "white" and queries["text_to_image"][2]["answers"][0][0] == 4


def test_captions_that_say_the_same(model, params, processor, colours):
    """Fifteen images of five colours: by label a perfect model is perfect, by example every caption has rivals."""
    spec, _ = colours(count=15, noise=0, text=lambda i: WORDS[i % 5])
    embedder = Embedder(model, params, processor)
    assert prepare(spec, group="label")(embedder).metrics["mean_recall"] == 1.0
    assert prepare(spec)(embedder).metrics["mean_recall"] == 0.0


@pytest.mark.parametrize(
    ("value", "expected"), [("a", ["a"]), (b"\xc3\xa9", ["é"]), (["a", "b"], ["a", "b"]), (np.array(["a"]), ["a"])]
)
def test_forms_of_texts(value, expected):
    assert texts_of({"text": value}, "text") == expected


@pytest.mark.parametrize("value", [None, [], "", " ", ["a", ""], 3, ["a", 4]])
def test_other_values_are_named(value):
    with pytest.raises(UserError, match="example 'k': expected a text"):
        texts_of({"key": "k", "text": value}, "text")


def test_wrong_settings(colours):
    spec, _ = colours(count=3)
    with pytest.raises(UserError, match="no field 'texts'; did you mean 'text'"):
        prepare(spec, text="texts")
    with pytest.raises(ValueError, match="k: expected depths"):
        RetrievalConfig(spec, k=(0,))
    with pytest.raises(ValueError, match="captions: expected at least 1"):
        RetrievalConfig(spec, captions=0)
