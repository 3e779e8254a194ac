"""Embeddings equal a plain loop over the examples, whatever the batch, the devices and the unreadable images."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from vlm.data.source import open_source
from vlm.errors import UserError
from vlm.evaluation.embed import Embedder


def mesh_of(*shape):
    grid = np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def expected_images(rows, params):
    embeds = np.stack([image.mean((0, 1)) for image, _ in rows]) @ np.asarray(params["projection"])
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def note(example):
    return {"key": example["key"]}


@pytest.mark.parametrize("batch_size", [1, 4, 23, 64])
@pytest.mark.parametrize("shape", [None, (8, 1, 1), (2, 2, 2)], ids=str)
def test_images(shape, batch_size, model, params, processor, colours):
    spec, rows = colours(count=23)
    mesh = mesh_of(*shape) if shape else None
    embedder = Embedder(model, params, processor, mesh, batch_size=batch_size)
    done = []
    embeds, notes = embedder.all_images(open_source(spec), note, done.append)
    np.testing.assert_allclose(embeds, expected_images(rows, params), atol=1e-6)
    assert [n["key"] for n in notes] == [f"k{i}" for i in range(23)] and [n["index"] for n in notes] == list(range(23))
    assert done[-1] == 23 and done == sorted(done)


def test_unreadable_images_are_left_out(model, params, processor, colours):
    spec, rows = colours(count=10, broken=(0, 4))
    embeds, notes = Embedder(model, params, processor, batch_size=4).all_images(open_source(spec), note)
    kept = [i for i in range(10) if i not in (0, 4)]
    np.testing.assert_allclose(embeds, expected_images(rows, params)[kept], atol=1e-6)
    assert [n["index"] for n in notes] == kept


def test_nothing_readable_is_an_error(model, params, processor, colours):
    spec, _ = colours(count=3, broken=(0, 1, 2))
    with pytest.raises(UserError, match="damaged PNG"):
        Embedder(model, params, processor).all_images(open_source(spec), note)


def test_a_refused_note_stops_instead_of_skipping(model, params, processor, colours):
    spec, _ = colours(count=3)

    def refuse(example):
        raise UserError("label 7 is outside")

    with pytest.raises(UserError, match="label 7"):
        Embedder(model, params, processor).all_images(open_source(spec), refuse)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_texts_keep_their_order(shape, model, params, processor, monkeypatch):
    monkeypatch.setattr("vlm.evaluation.embed.TEXT_GROUP", 5)
    texts = ["red", "dark " * 20 + "blue", "photo green", "white", "red red red", "yellow", "dark red"] * 2
    embedder = Embedder(model, params, processor, mesh_of(*shape) if shape else None, batch_size=3)
    batch = processor(texts=texts)
    words = np.asarray(params["words"])[batch["tokens"]] * batch["mask"][..., None]
    expected = words.sum(1) @ np.asarray(params["projection"])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.texts(texts), expected, atol=1e-6)
