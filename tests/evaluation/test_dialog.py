"""Candidates of a dialog ranked by a random BLIP, as a loop over them ranks them."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from vlm import evaluation
from vlm.errors import UserError
from vlm.models.blip.processor import Processor

from ..data.test_visdial import spec_of, write

RELEVANCE = (0, 0.5, 0, 0, 1)  # of the second round


@pytest.fixture(scope="module")
def ranker(tiny_blip):
    model, params, processor = tiny_blip("classification")
    config = dataclasses.replace(processor.config, task="dialog", max_length=24, caption_length=8)
    return model, params, Processor(processor.tokenizer, config)


@pytest.fixture
def spec(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)).save(picture, "PNG")
    data = spec_of(write(tmp_path, picture.getvalue(), options=5))
    return {"kind": "visual_dialog", "data": data, "bootstrap": {"resamples": 10}, "batch_size": 3, "k": (1, 2)}


def test_ranks_equal_a_loop_over_the_candidates(ranker, spec, tmp_path, monkeypatch):
    model, params, processor = ranker
    spec["options_per_step"] = 2  # the last part overlaps
    metrics = evaluation.run({"v": spec}, *ranker, output=tmp_path / "r.json", progress=False)
    source = evaluation.prepare({"v": spec}).evaluators["v"][0].source
    official = json.loads((tmp_path / "r.v.results.json").read_text())

    @jax.jit
    def score(image, row):
        variables = {"params": params}
        known = model.apply(variables, image, row["caption_tokens"], row["caption_mask"], method="encode_dialog")
        return model.apply(variables, row["tokens"], row["mask"], *known, method="match")

    places = []
    for number in range(4):
        example = source[number]
        texts = processor.dialog(example)
        image = processor(images=[example["image"]])["image"]
        logits = np.array(
            [
                score(image, {name: x[None] for name, x in texts.items()} | {
                    "tokens": texts["tokens"][option][None], "mask": texts["mask"][option][None]
                })[0]
                for option in range(5)
            ]
        )  # fmt: skip
        scores = logits[:, 1] - logits[:, 0]
        assert official[number]["image_id"] == example["image_id"] and official[number]["round_id"] == example["round"]
        assert official[number]["ranks"] == (np.argsort(np.argsort(-scores)) + 1).tolist()
        places.append(official[number]["ranks"][example["answer"]])
    assert metrics["v/mrr"] == pytest.approx(np.mean(1 / np.array(places)))
    assert metrics["v/mean_rank"] == pytest.approx(np.mean(places))
    gains = [
        share / np.log2(place + 1) for share, place in zip(RELEVANCE, official[1]["ranks"], strict=True) if place < 3
    ]
    assert metrics["v/ndcg"] == pytest.approx(sum(gains) / (1 + 0.5 / np.log2(3)))
    assert '"dense": 1' in (tmp_path / "r.json").read_text()


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("caption", {}, "expected a processor of task 'dialog'"),
        ("classification", {}, "expected a processor of task 'dialog'"),
        (None, {"data": {"kind": "jsonl"}}, "options: expected candidate answers"),
        (None, {"options_per_step": 0}, "expected numbers of at least 1"),
    ],
)
def test_what_cannot_be_ranked(ranker, tiny_blip, spec, tmp_path, task, change, message):
    if "data" in change:
        (tmp_path / "plain.jsonl").write_text('{"text": "a"}\n')
        change = {"data": change["data"] | {"path": f"{tmp_path}/plain.jsonl"}}
    with pytest.raises(UserError, match=message):
        evaluation.run({"v": spec | change}, *(ranker if task is None else tiny_blip(task)), progress=False)
