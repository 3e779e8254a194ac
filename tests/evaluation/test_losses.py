"""Losses of pretraining on held-out data: the same hidden tokens however they are batched, exact means, refusals."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from vlm import evaluation
from vlm.data.masking import IGNORE
from vlm.data.teacher_cache import write_cache
from vlm.errors import UserError

SAID = ("there is a five", "there is a two left of a nine", "a three", "a nine above a two", "a four right of a one")
ROWS = 11


@pytest.fixture(scope="module")
def data(tmp_path_factory, scenes_folder):
    """Eleven pairs, and random visual words of their pictures."""
    folder = tmp_path_factory.mktemp("held_out")
    pictures = [path.read_bytes() for path in sorted((scenes_folder / "images").glob("test_*.png"))[:ROWS]]
    for number, picture in enumerate(pictures):
        (folder / f"{number}.png").write_bytes(picture)
    rows = [{"image": f"{i}.png", "text": SAID[i % 5]} for i in range(ROWS)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = np.random.default_rng(0).integers(0, 8192, (ROWS, 9))
    write_cache(folder / "words", [(pictures, words)], teacher="codebook:x", dtype="uint16", vocab_size=8192)
    return folder


def spec(folder, *fields, **more):
    source = {"kind": "jsonl", "path": str(folder / "pairs.jsonl"), "fields": {name: name for name in fields}}
    return {"held_out": {"kind": "losses", "data": source, "num_workers": 0, **more}}


def test_pairs_whatever_the_batch_and_the_devices(data, tiny_flava, mesh8):
    *made, processor = tiny_flava(task="pretrain", itm_probability=0.4, mask_patches=4)
    processor = copy.copy(processor)
    blocks = dataclasses.replace(processor.config.blocks, min_patches=1)
    processor.config = dataclasses.replace(processor.config, blocks=blocks)
    made.append(processor)
    settings = {"codebook_cache": str(data / "words")}
    with jax.set_mesh(mesh8):
        split = evaluation.run(spec(data, "image", "text", batch_size=8, **settings), *made, progress=False)
    whole = evaluation.run(spec(data, "image", "text", batch_size=ROWS, **settings), *made, progress=False)
    names = {name.partition("/")[2] for name in whole}
    assert {"mmm_image", "mmm_text", "itm", "itm_accuracy", "contrastive"} <= names
    assert not [name for name in names if "count" in name or "dropped" in name or "scale" in name]
    for name in names - {"contrastive", "positive_cosine"}:
        np.testing.assert_allclose(split[f"held_out/{name}"], whole[f"held_out/{name}"], rtol=1e-5, err_msg=name)
    assert split["held_out/contrastive"] != whole["held_out/contrastive"]  # eight candidates and not eleven


def test_texts_equal_their_definition(data, tiny_flava):
    model, params, processor = tiny_flava(task="pretrain", itm_probability=0.4)
    found = evaluation.run(spec(data, "text", batch_size=4, seed=3), model, params, processor, progress=False)
    rows = [
        processor.example({"text": SAID[index % 5]}, np.random.default_rng((3, index)), True) for index in range(ROWS)
    ]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def logits(params):
        bound = model.bind({"params": params})
        states = bound.encode_text_states(batch["masked_tokens"], batch["mask"]).last_hidden_state
        return bound.predict_masked("mlm", states)

    scores = np.asarray(jax.jit(logits)(params), np.float64)
    hidden = batch["token_labels"] != IGNORE
    assert hidden.any() and not hidden.any(1).all()  # a short text may have nothing hidden
    chosen = np.take_along_axis(scores, np.where(hidden, batch["token_labels"], 0)[..., None], -1)[..., 0]
    losses = np.log(np.exp(scores).sum(-1)) - chosen
    assert found.keys() == {"held_out/mlm", "held_out/mlm_accuracy"}
    np.testing.assert_allclose(found["held_out/mlm"], losses[hidden].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "more", "message"),
    [
        ({}, {"seed": -1}, "seed: expected at least 0, found -1"),
        ({}, {"loss": {"mlmm": 1}}, "did you mean 'mlm'"),
        ({"mlm_probability": 0.0}, {}, "needs masked_tokens"),
        ({"task": "classification", "reads": "text"}, {}, "label: expected a class number"),
    ],
)
def test_what_cannot_be_measured_is_refused(data, tiny_flava, made, more, message):
    with pytest.raises(UserError, match=message):
        evaluation.run(spec(data, "text", **more), *tiny_flava(**{"task": "pretrain"} | made), progress=False)


def test_a_family_without_losses_of_evaluation_is_refused(data, tiny_blip):
    with pytest.raises(UserError, match="cannot measure losses of such examples"):
        evaluation.run(spec(data, "image", "text"), *tiny_blip("caption"), progress=False)
