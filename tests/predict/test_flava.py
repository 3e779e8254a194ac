"""A FLAVA from the command line: the joint space classifies, retrieves and embeds, the matching head judges pairs."""

import json

import jax
import numpy as np
import pytest

import vlm
from vlm import predict

TEXTS = ("there is a five", "there is a two left of a nine", "a three")


@pytest.fixture(scope="module")
def folder(tiny_flava, tmp_path_factory):
    path = tmp_path_factory.mktemp("flava") / "model"
    vlm.save(path, *tiny_flava())
    return path


@pytest.fixture(scope="module")
def expected(tiny_flava, scenes_folder):
    """What the model itself says of two images and three texts."""
    model, params, processor = tiny_flava()
    images = sorted((scenes_folder / "images").glob("test_*.png"))[:2]
    pairs = processor(images=[path for path in images for _ in TEXTS], texts=TEXTS * 2)

    def call(params, image, tokens, mask):
        found = [model.apply({"params": params}, image, method="encode_image")]
        found += [model.apply({"params": params}, tokens, mask, method="encode_text")]
        return *found, model.apply({"params": params}, image, tokens, mask, method="match")

    image, text, logits = jax.jit(call)(params, pairs["image"], pairs["tokens"], pairs["mask"])
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.asarray(image), np.asarray(text)))
    matched = np.asarray(jax.nn.softmax(logits))[:, 1]
    return images, image[:: len(TEXTS)], text[: len(TEXTS)], matched.reshape(2, 3)


def run(folder, capsys, task, images, *more):
    flags = [f"--image={path}" for path in images] + [f"--text={text}" for text in TEXTS]
    assert predict.main([str(folder), f"--task={task}", "--batch_size=2", *flags, *map(str, more)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_joint_space(folder, expected, capsys, tmp_path):
    images, image, text, _ = expected
    found = run(folder, capsys, "classify", images)["results"]
    assert [row["prediction"] for row in found] == [TEXTS[i] for i in (image @ text.T).argmax(1)]
    found = run(folder, capsys, "retrieve", images)["text_to_image"]
    assert [row["images"][0]["image"] for row in found] == [str(images[i]) for i in (image @ text.T).argmax(0)]
    run(folder, capsys, "embed", images, f"--output={tmp_path / 'e.npy'}")
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), np.concatenate([image, text]), atol=1e-5)


def test_matching(folder, expected, capsys):
    images, image, text, matched = expected
    found = run(folder, capsys, "match", images)["results"]
    assert [(row["image"], row["text"]) for row in found] == [(str(path), text) for path in images for text in TEXTS]
    np.testing.assert_allclose([row["probability"] for row in found], matched.reshape(-1), atol=1e-5)
    np.testing.assert_allclose([row["cosine"] for row in found], (image @ text.T).reshape(-1), atol=1e-5)
