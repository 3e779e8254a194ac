"""A classifier's evaluation: every example once, the metrics of scikit-learn, the official accuracy of VQA."""

import json

import jax
import numpy as np
import pytest
from sklearn import metrics as sklearn

from vlm import evaluation
from vlm.errors import UserError
from vlm.evaluation.metrics import vqa as official

SMALL = {"bootstrap": {"resamples": 20}, "batch_size": 8}
SAID = ("there is a five", "there is a two left of a nine", "a three", "there is a nine above a two")


def evaluate(spec, made, output=None, mesh=None):
    return evaluation.run({"s": spec}, *made, mesh=mesh, output=output, progress=False)


def lines(output):
    return [json.loads(line) for line in output.with_suffix(".s.jsonl").read_text().splitlines()]


def classified(made, batch, **flags):
    """Scores by the model's own method."""
    model, params, _ = made
    call = jax.jit(lambda params, batch: model.apply({"params": params}, **batch, **flags, method="classify"))
    return np.asarray(call(params, batch))


@pytest.fixture
def pairs(tmp_path):
    """Eleven pairs of sentences, labelled in words, with a header and a broken line."""

    def make(labels):
        rows = [f"{SAID[i % 4]}\t{SAID[(i + i // 4) % 4]}\t{labels[i % len(labels)]}" for i in range(11)]
        (tmp_path / "dev.tsv").write_text("\n".join(["one\ttwo\tis", *rows[:5], "broken", *rows[5:]]) + "\n")
        fields = {"text": "one", "text_pair": "two", "label": "is"}
        return {"kind": "tsv", "path": str(tmp_path / "dev.tsv"), "fields": fields, "max_broken": 1}

    return make


def test_pairs_of_sentences(tiny_flava, pairs, tmp_path):
    _, params, processor = made = tiny_flava("text")
    names, data = ("not_entailment", "entailment"), pairs(("entailment", "not_entailment", "entailment"))
    chosen = ("accuracy", "f1", "matthews", "auroc", "mean_per_class_recall")
    spec = {"kind": "classification", "data": data, "text_pair": "text_pair", "names": names, "metrics": chosen} | SMALL
    source = evaluation.prepare({"s": spec}).evaluators["s"][0].source
    examples = [source[i] for i in range(11)]
    texts = {"texts": [e["text"] for e in examples], "pairs": [e["text_pair"] for e in examples]}
    batch = processor(**texts)
    assert batch["token_types"].any()  # the second sentence is told apart
    scores = classified(made, batch)
    middle = np.array([np.median(scores[:, 1] - scores[:, 0]), 0], np.float32)  # so that both classes are said
    params["classifier"]["out"]["bias"] += middle
    scores = scores + middle
    metrics = evaluate(spec, made, tmp_path / "r.json")
    labels, said = np.array([names.index(e["label"]) for e in examples]), scores.argmax(axis=1)
    assert 3 < said.sum() < 8
    rows = lines(tmp_path / "r.json")
    assert [row["prediction"] for row in rows] == said.tolist() and rows[5]["key"] == "dev.tsv:8"
    probability = np.exp(scores.max(1)) / np.exp(scores).sum(1)
    np.testing.assert_allclose([row["probability"] for row in rows], probability, atol=1e-5)
    expected = {
        "accuracy": sklearn.accuracy_score(labels, said),
        "f1": sklearn.f1_score(labels, said),
        "matthews": sklearn.matthews_corrcoef(labels, said),
        "auroc": sklearn.roc_auc_score(labels, scores[:, 1] - scores[:, 0]),
        "mean_per_class_recall": sklearn.balanced_accuracy_score(labels, said),
    }
    assert metrics == pytest.approx({f"s/{name}": value for name, value in expected.items()}, abs=1e-6)
    page = (tmp_path / "r.html").read_text()
    assert "not_entailment" in page and "data:image" not in page  # texts alone have no pictures
    unlabelled = {**spec, "label": None, "data": {**data, "fields": {"text": "one", "text_pair": "two"}}}
    assert evaluate(unlabelled, made, tmp_path / "u.json") == {}
    assert [row["prediction"] for row in lines(tmp_path / "u.json")] == said.tolist()


def test_values(tiny_flava, pairs, tmp_path):
    _, _, processor = made = tiny_flava("text", 1, "regression")
    data = pairs(("3.800", "0.000", "5.000", "3.800", "1.25"))
    chosen = ("pearson", "spearman", "mean_squared_error")
    spec = {"kind": "classification", "data": data, "text_pair": "text_pair", "metrics": chosen} | SMALL
    metrics = evaluate(spec, made, tmp_path / "r.json")
    rows = lines(tmp_path / "r.json")
    said, labels = np.array([row["prediction"] for row in rows]), np.array([row["label"] for row in rows])
    assert labels[:3].tolist() == [3.8, 0.0, 5.0] and len(set(said)) > 4
    batch = processor(texts=[row["text"] for row in rows], pairs=[row["text_pair"] for row in rows])
    np.testing.assert_allclose(said, classified(made, batch)[:, 0], atol=1e-5)
    assert metrics["s/pearson"] == pytest.approx(np.corrcoef(said, labels)[0, 1], abs=1e-4)
    assert metrics["s/mean_squared_error"] == pytest.approx(sklearn.mean_squared_error(labels, said), abs=1e-4)


@pytest.fixture
def memes(scenes_folder, tmp_path):
    (tmp_path / "img").mkdir()
    rows = []
    for i, path in enumerate(sorted((scenes_folder / "images").glob("test_*.png"))[:10]):
        (tmp_path / f"img/{i}.png").write_bytes(path.read_bytes() if i != 1 else b"broken")
        rows.append({"id": i, "img": f"img/{i}.png", "text": SAID[i % 4], "label": int(i % 3 == 1)})
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "kind": "jsonl",
        "path": str(tmp_path / "dev.jsonl"),
        "fields": {"image": "img", "text": "text", "label": "label"},
    }


def test_images_and_texts_on_any_mesh(tiny_flava, memes, tmp_path, mesh8):
    _, _, processor = made = tiny_flava("multimodal")
    spec = (
        {"kind": "classification", "data": memes, "metrics": ("auroc", "accuracy")}
        | SMALL
        | {"batch_size": 4, "max_skip_fraction": 0.5}
    )
    metrics = evaluate(spec, made, tmp_path / "r.json", mesh8)
    result = json.loads((tmp_path / "r.json").read_text())["evaluations"]["s"]
    assert (result["n"], result["unreadable"]) == (9, 1)
    rows = lines(tmp_path / "r.json")
    assert [row["index"] for row in rows] == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    source = evaluation.prepare({"s": spec}).evaluators["s"][0].source
    batch = processor(images=[source[row["index"]]["image"] for row in rows], texts=[row["text"] for row in rows])
    scores = classified(made, batch)
    assert metrics["s/auroc"] == pytest.approx(sklearn.roc_auc_score([r["label"] for r in rows], np.diff(scores)[:, 0]))
    assert [row["prediction"] for row in rows] == scores.argmax(1).tolist()
    probability = np.exp(scores.max(1)) / np.exp(scores).sum(1)
    np.testing.assert_allclose([row["probability"] for row in rows], probability, atol=1e-5)


def test_answers_of_a_classifier_in_a_larger_size(tiny_flava, scenes_folder, tmp_path):
    answers = ["five", "two", "left", "nine"]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    settings = {"answers": str(tmp_path / "answers.json"), "num_answers": 4}
    made = _, _, processor = tiny_flava("multimodal", 4, "soft_labels", **settings)
    processor.image_settings = type(processor.image_settings)(32, None, mode="exact")  # positions are interpolated
    rows = []
    for i, path in enumerate(sorted((scenes_folder / "images").glob("test_*.png"))[:6]):
        given = [answers[i % 4]] * (i % 3 + 1) + ["other"] * (9 - i % 3)
        rows.append({"question_id": 100 + i, "question": SAID[i % 4], "answer": given, "image": path.name})
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    data = {"kind": "json", "path": str(tmp_path / "vqa.json"), "root": str(scenes_folder / "images")}
    spec = {"kind": "vqa", "data": data, "mode": "classify"} | SMALL
    metrics = evaluate(spec, made, tmp_path / "r.json")
    results = json.loads((tmp_path / "r.s.results.json").read_text())
    assert [row["question_id"] for row in results] == list(range(100, 106))
    image = processor(images=[scenes_folder / "images" / row["image"] for row in rows])["image"]
    assert image.shape[1] == 32
    batch = {"image": image, **processor(texts=[row["question"] for row in rows])}
    scores = classified(made, batch, interpolate_positions=True)
    assert [row["answer"] for row in results] == [answers[best] for best in scores.argmax(1)]
    people = [[{"answer": text, "answer_id": n} for n, text in enumerate(row["answer"])] for row in rows]
    each = [official.accuracy(row["answer"], given) for row, given in zip(results, people, strict=True)]
    assert metrics["s/accuracy"] == pytest.approx(np.mean(each))
    with pytest.raises(UserError, match="4 outputs, and the list 2 answers"):
        evaluate({**spec, "answer_list": ("five", "two")}, made)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": ("acuracy",)}, "no metric 'acuracy'; did you mean 'accuracy'"),
        ({"metrics": ("accuracy", "pearson")}, "expected some of classes or some of values"),
        ({"metrics": ("pearson",), "label": None}, "pearson do not fit a model with 2 outputs"),
        ({"names": ("a", "b")}, "expected a class number or name as label, found 'yes'"),
        ({"names": ("yes", "no", "c")}, "names: expected 2, as the model has classes, found 3"),
        ({"label": "lable"}, "has no field 'lable'; did you mean 'label'"),
        ({"text_pair": "second"}, "has no field 'second'"),
        ({"text": "question"}, "has neither image nor 'question'"),
    ],
)
def test_wrong_settings(tiny_flava, pairs, change, message):
    spec = {"kind": "classification", "data": pairs(("yes", "no")), "names": ("no", "yes"), **change}
    with pytest.raises(UserError, match=message):
        evaluate(spec, tiny_flava("text"))


def test_a_model_without_classifier(tiny_flava, pairs):
    spec = {"kind": "classification", "data": pairs(("0", "1"))}
    with pytest.raises(UserError, match="FLAVA: this model has no classifier"):
        evaluate(spec, tiny_flava())
