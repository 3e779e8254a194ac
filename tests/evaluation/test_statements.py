"""True or false: probabilities of the right head, accuracy per sentence, and the majority as baseline."""

import json

import jax
import numpy as np
import pytest

from vlm import evaluation
from vlm.errors import UserError
from vlm.evaluation.metrics import files, nlvr2


@pytest.fixture
def spec(scenes_folder, tmp_path):
    def make(pairs):
        (tmp_path / "images").symlink_to(scenes_folder / "images")
        names = [f"images/{path.name}" for path in sorted((scenes_folder / "images").glob("test_*.png"))]
        rows = []
        for i in range(10):
            text = f"there is a {('five', 'two', 'nine', 'three')[i % 4]}"
            row = {"sentence": text, "label": ("True", "False", "True")[i % 3], "identifier": f"dev-{i % 4}-{i // 4}-0"}
            rows.append(row | ({"images": names[i : i + 2]} if pairs else {"image": names[i]}))
        (tmp_path / "data.json").write_text(json.dumps(rows))
        data = {"kind": "json", "path": str(tmp_path / "data.json"), "root": str(scenes_folder)}
        return {"kind": "nlvr2", "data": data, "bootstrap": {"resamples": 20}, "batch_size": 4}, rows

    return make


@pytest.mark.parametrize("task", ["nlvr", "classification"])
def test_equals_one_statement_at_a_time(tiny_blip, spec, tmp_path, mesh8, task):
    model, params, processor = tiny_blip(task)
    settings, rows = spec(task == "nlvr")
    output = tmp_path / "r.json"
    metrics = evaluation.run({"s": settings}, model, params, processor, output=output, progress=False)
    source = evaluation.prepare({"s": settings}).evaluators["s"][0].source
    predicted, labels = {}, {}
    lines = [json.loads(line) for line in (tmp_path / "r.s.jsonl").read_text().splitlines()]
    apply = jax.jit(lambda batch: model.apply({"params": params}, **batch))
    for index, row in enumerate(rows):
        batch = processor(images=[source[index]["image"]], texts=[row["sentence"]])
        found = apply(batch)
        logits = np.asarray(found.logits if task == "nlvr" else found.itm_score)[0]
        predicted[row["identifier"]] = bool(logits[1] > logits[0])
        labels[row["identifier"]] = row["label"] == "True"
        assert lines[index]["probability"] == pytest.approx(1 / (1 + np.exp(logits[0] - logits[1])), abs=1e-4)
    assert files.nlvr2_predictions(tmp_path / "r.s.results.json") == predicted
    expected = nlvr2.score(predicted, labels)
    assert {key: metrics[f"s/{key}"] for key in expected} == pytest.approx(expected)
    right = {name: [predicted[i] == name for i in labels if labels[i] == name] for name in (True, False)}
    assert metrics["s/balanced_accuracy"] == pytest.approx(np.mean([np.mean(right[True]), np.mean(right[False])]))
    assert metrics["s/majority_baseline"] == pytest.approx(0.7)
    assert (tmp_path / "r.html").read_text().count("data:image/png") == (20 if task == "nlvr" else 10)
    if task == "nlvr":
        _scored_again(settings, tmp_path, metrics)
        return
    with jax.set_mesh(mesh8):
        assert evaluation.run({"s": settings}, model, params, processor, progress=False) == pytest.approx(metrics)


def _scored_again(settings, tmp_path, metrics):
    """Lists as BLIP ships them name no examples; the result file of such data and `vlm.score` agree on names."""
    path = tmp_path / "data.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{k: v for k, v in row.items() if k != "identifier"} for row in rows]))
    evaluator = evaluation.prepare({"s": settings}).evaluators["s"][0]
    predicted = files.nlvr2_predictions(tmp_path / "r.s.results.json")
    notes = [{"index": i} | evaluator.note(evaluator.source[i]) for i in range(len(rows))]
    guessed = [n | {"prediction": predicted[r["identifier"]]} for n, r in zip(notes, rows, strict=True)]
    result = evaluator._result(
        [n | {"correct": n["prediction"] == n["label"], "probability": 0.5} for n in guessed], ""
    )
    names = {row["identifier"]: row["prediction"] for row in result.official}
    again = nlvr2.score(names, *files.nlvr2_labels(path))
    assert again == {name: result.metrics[name] for name in again} and again["accuracy"] == metrics["s/accuracy"]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("classification", {"head": "classify"}, "cannot judge statements"),
        ("caption", {}, "cannot judge statements"),
        ("classification", {"label": "truth"}, "no field 'truth'"),
        ("classification", {"label": "sentence"}, "label"),
    ],
)
def test_wrong_settings(tiny_blip, spec, task, change, message):
    with pytest.raises(UserError, match=message):
        evaluation.run({"s": spec(False)[0] | change}, *tiny_blip(task), progress=False)
