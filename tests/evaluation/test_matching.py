"""Retrieval with matching: shortlist and second ranking equal a loop over every pair, on toy matrices and a model."""

import jax
import numpy as np
import pytest

from vlm import evaluation
from vlm.errors import UserError
from vlm.evaluation import matching, retrieval


@pytest.fixture
def spec(scenes_folder):
    data = {"kind": "json", "path": str(scenes_folder / "caption_test.json"), "split": "[:7]"}
    return {
        "kind": "matching_retrieval", "data": data, "text": "caption", "bootstrap": {"resamples": 5}, "k": (1, 2),
        "batch_size": 4, "shortlist": 3, "texts_per_step": 2,
    }  # fmt: skip


def test_shortlists_on_toy_matrices():
    scores = np.array([[0.1, 0.9, 0.5, 0.9], [0.3, 0.3, 0.3, 0.3]], np.float32)
    np.testing.assert_array_equal(matching.shortlists(scores, 2), [[0, 1, 0, 1], [1, 1, 0, 0]])
    assert matching.shortlists(scores, 9).all()
    listed = matching.shortlists(scores, 2)
    kept = matching.only(np.array([[5.0, -7.0, 9.0, -8.0], [1, 2, 3, 4]]), listed)
    np.testing.assert_array_equal(kept, [[-np.inf, -7, -np.inf, -8], [1, 2, -np.inf, -np.inf]])
    # What is not listed comes last, however good the head would find it: the order of the published −100.
    published = np.where(listed, [[5.0, -7.0, 9.0, -8.0], [1, 2, 3, 4]], -100)
    text_image = np.array([0, 0, 1, 1])
    for scores in (kept, published):
        found = retrieval.score_ranks(scores, scores.T, text_image)
        np.testing.assert_array_equal(found.image_to_text, [0, 2])


def test_equals_a_loop_over_pairs(tiny_blip, spec, mesh8):
    model, params, processor = tiny_blip("retrieval")
    source = evaluation.prepare({"r": spec}).evaluators["r"][0].source
    examples = [source[index] for index in range(7)]
    texts = [example["caption"][0] for example in examples]
    batch = processor(images=[example["image"] for example in examples], texts=texts)
    compared = jax.jit(lambda batch: model.apply({"params": params}, **batch, use_itm_head=False))(batch)
    head = jax.jit(lambda batch: model.apply({"params": params}, **batch).itm_score[:, 1])
    cosines = np.asarray(compared.image_embeds @ compared.text_embeds.T)
    logits = np.zeros((7, 7))
    for image in range(7):
        logits[image] = head(batch | {"image": np.repeat(batch["image"][image : image + 1], 7, 0)})
    expected = {}
    for name, scores in (("itm/", logits), ("", logits + cosines)):
        ways = []
        for order, values in ((cosines, scores), (cosines.T, scores.T)):
            places = []
            for row in range(7):
                best = np.argsort(-order[row], kind="stable")[:3]
                ranked = sorted(best, key=lambda item, row=row, values=values: -values[row, item])
                places.append(ranked.index(row) if row in ranked else 6)
            ways.append(np.array(places))
        for way, places in zip(("image_to_text", "text_to_image"), ways, strict=True):
            expected |= {f"r/{name}{way}_recall@{k}": float((places < k).mean()) for k in (1, 2)}
    metrics = evaluation.run({"r": spec}, model, params, processor, progress=False)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    direct = retrieval.recall(
        retrieval.ranks(*map(np.asarray, (compared.image_embeds, compared.text_embeds)), np.arange(7)), (1, 2)
    )  # of the embeddings alone
    assert {key: metrics[f"r/itc/{key}"] for key in direct} == pytest.approx(direct)
    both = [metrics[f"r/{way}_mean_recall"] for way in ("image_to_text", "text_to_image")]
    assert metrics["r/mean_recall"] == pytest.approx(np.mean(both))
    assert metrics["r/text_to_image_median_rank"] >= 1
    with jax.set_mesh(mesh8):
        again = evaluation.run({"r": spec | {"texts_per_step": 5}}, model, params, processor, progress=False)
    assert again == pytest.approx(metrics)


def test_each_pair_is_matched_once_and_every_score_is_right(tiny_blip, spec, tmp_path):
    model, params, processor = tiny_blip("retrieval")
    evaluator = evaluation.prepare({"r": spec}).evaluators["r"][0]
    from vlm.evaluation.embed import Embedder

    embedder = Embedder(model, params, processor, batch_size=4)
    gallery = matching.Gallery.of(embedder, evaluator.source, evaluator.note, "float32", None)
    texts = [note["texts"][0] for note in gallery.notes]
    pairs = np.random.default_rng(0).random((7, 7)) < 0.4
    pairs[2] = False
    found = gallery.match(embedder, texts, pairs, 2)
    np.testing.assert_array_equal(np.isfinite(found), pairs)
    whole = gallery.match(embedder, texts, np.ones((7, 7), bool), 2)
    np.testing.assert_allclose(found[pairs], whole[pairs], atol=2e-5)
    half = matching.Gallery.of(embedder, evaluator.source, evaluator.note, "bfloat16", None)
    assert half.tokens.dtype == "bfloat16" and half.tokens.nbytes * 2 == gallery.tokens.nbytes


def test_videos(tiny_blip, spec, scenes_folder, tmp_path):
    import json

    (tmp_path / "images").symlink_to(scenes_folder / "images")
    names = sorted(path.name for path in (scenes_folder / "images").glob("test_*.png"))
    rows = [{"image": [f"images/{names[i]}", f"images/{names[i + 1]}"], "caption": f"a {w}"} for i, w in
            enumerate(("five on the left", "two", "nine on the right"))]  # fmt: skip
    (tmp_path / "videos.json").write_text(json.dumps(rows))
    data = {"kind": "json", "path": str(tmp_path / "videos.json"), "root": str(scenes_folder), "frames": 2}
    model, params, processor = tiny_blip("retrieval", video="concatenate")
    output = tmp_path / "r.json"
    run = evaluation.run({"r": spec | {"data": data}}, model, params, processor, output=output, progress=False)
    assert run["r/text_to_image_median_rank"] in (1, 2, 3)
    assert (tmp_path / "r.html").read_text().count("data:image/png") > 3


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("retrieval", {"shortlist": 0}, "shortlist: expected at least 1"),
        ("retrieval", {"k": ()}, "k: expected depths"),
        ("caption", {}, "cannot encode"),
        ("classification", {}, "cannot encode an image"),
    ],
)
def test_wrong_settings(tiny_blip, spec, task, change, message):
    with pytest.raises(UserError, match=message):
        evaluation.run({"r": spec | change}, *tiny_blip(task), progress=False)


def test_zero_shot_classification_with_blip(tiny_blip, scenes_folder):
    """Class embeddings from the joint space: accuracy equals that of cosines computed one by one."""
    model, params, processor = tiny_blip("retrieval")
    data = {"kind": "json", "path": str(scenes_folder / "caption_test.json"), "fields": {"image": "image"}}
    names = ("five on the left", "a two", "nine")
    spec = {"kind": "zero_shot", "data": data, "classnames": names, "label": "image_id", "classes": (0, 1, 2)}
    spec |= {"templates": ("a picture of {c}",), "batch_size": 4, "bootstrap": {"resamples": 0}}
    spec["data"] |= {"split": "[:3]", "fields": {"image": "image", "image_id": "image_id"}}
    metrics = evaluation.run({"z": spec}, model, params, processor, progress=False)
    source = evaluation.prepare({"z": spec}).evaluators["z"][0].source
    images = [source[index]["image"] for index in range(3)]
    batch = processor(images=images, texts=[f"a picture of {name}" for name in names])
    found = jax.jit(lambda batch: model.apply({"params": params}, **batch, use_itm_head=False))(batch)
    cosines = np.asarray(found.logits_per_image) * np.asarray(params["temperature"])
    assert metrics["z/top1"] == pytest.approx((cosines.argmax(1) == np.arange(3)).mean())
