"""Running the evaluations of a configuration: settings at the door, files whole or not there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from vlm import evaluation
from vlm.errors import UserError

NAMES = ("red", "green", "blue", "yellow", "white")

FIELDS = {"image": "image", "label": "label"}


def specs(data, **more):
    common = {"data": data, "max_skip_fraction": 0.5}
    zero_shot = {"kind": "zero_shot", "classnames": NAMES, "bootstrap": {"resamples": 20}} | common
    return {
        "colours": zero_shot | {"pictures": 4, "batch_size": 8, "language": "en"},
        "pairs": {"kind": "retrieval", "pictures": 2, "bootstrap": {"resamples": 0}} | common,
        **more,
    }


def test_results_files(model, params, processor, colours, tmp_path):
    data, _ = colours(count=12, noise=150, broken=(5,))
    output = tmp_path / "out" / "first.json"
    extra = {"vectors": {"kind": "embeddings", "data": data, "text": "text", "max_skip_fraction": 0.5}}
    given = ConfigDict(specs(data, **extra))
    metrics = evaluation.run(given, model, params, processor, output=output, about={"checkpoint": "/c"}, progress=False)
    assert {"colours/top1", "pairs/mean_recall", "vectors/images"} <= metrics.keys()
    found = json.loads(output.read_text())
    assert found["metrics"] == metrics and found["format_version"] == 1 and found["checkpoint"] == "/c"
    colour = found["evaluations"]["colours"]
    assert (colour["n"], colour["unreadable"], colour["language"]) == (11, 1, "en")
    assert colour["config"]["classnames"] == list(NAMES) and len(colour["templates_sha256"]) == 64
    assert colour["data_fingerprint"] and len(colour["intervals_95"]["top1"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "first.colours.jsonl").read_text().splitlines()]
    assert len(lines) == 11 and np.mean([line["correct"] for line in lines]) == pytest.approx(metrics["colours/top1"])
    assert (tmp_path / "out" / "first.html").read_text().count("data:image/png;base64,") >= 4
    assert np.load(tmp_path / "out" / "first" / "vectors" / "image-00000-of-00001.npy").shape == (11, 8)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"first.json", "first.html", "first.colours.jsonl", "first.pairs.jsonl", "first"}


def test_equal_on_a_mesh_and_without_a_file(model, params, processor, colours):
    data, _ = colours(count=11, noise=150)
    plan = evaluation.prepare(specs(data))
    plain = evaluation.run(plan, model, params, processor, progress=False)
    grid = np.asarray(jax.devices()[:8]).reshape(2, 2, 2)
    with jax.set_mesh(Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
        sharded = evaluation.run(plan, model, params, processor, progress=False)
    assert plain == pytest.approx(sharded, abs=1e-9)


def test_one_data_set_in_several_languages_is_embedded_once(model, params, processor, colours):
    data, _ = colours(count=10, noise=255, broken=(3,))
    other, _ = colours(count=10, noise=0, name="other")
    seen = []

    class Counting(type(processor)):
        def __call__(self, images=None, texts=None):
            seen.extend(images or ())
            return super().__call__(images, texts)

    german = specs(data)["colours"] | {"classnames": ("rot", *NAMES[1:]), "data": data | {"fields": FIELDS}}
    english = specs(data)["colours"] | {"data": data | {"fields": FIELDS | {"label": "word"}}}
    plan = {"en": english, "de": german, "other": specs(other)["colours"]}
    metrics = evaluation.run(plan, model, params, Counting(), progress=False)
    # One blank image to check the model; unreadable images never reach the processor, their stand-ins do.
    assert len(seen) == 1 + 16 + 16
    alone = evaluation.run({"de": german}, model, params, processor, progress=False)
    assert alone["de/top1"] == metrics["de/top1"] == metrics["en/top1"] and metrics["other/top1"] != metrics["en/top1"]


def test_unreadable_examples_are_named_and_many_stop_the_evaluation(model, params, processor, colours, caplog):
    data, _ = colours(count=10, broken=(3, 8))
    whole = {name: value for name, value in specs(data)["colours"].items() if name != "max_skip_fraction"}
    for more, words in ({}, "1 of 4 .*fraction=0.001 allows; .*'k3'"), ({"max_skip_fraction": 0.1}, "2 of .*'k8'"):
        with pytest.raises(UserError, match=f"^config.eval.colours: {words}"):
            evaluation.run({"colours": whole | more}, model, params, processor, progress=False)
    caplog.clear()
    evaluation.run({"colours": whole | {"max_skip_fraction": 0.2}}, model, params, processor, progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "vlm"]
    assert len(lines) == 2 and "'k3'" in lines[0] and "'k8'" in lines[1]
    assert all("left out, it does not count" in line for line in lines)
    with pytest.raises(UserError, match="max_skip_fraction: expected a value from 0 to 1"):
        evaluation.prepare({"colours": specs(data)["colours"] | {"max_skip_fraction": 2.0}})


def test_progress_is_shown(model, params, processor, colours, capsys):
    data, _ = colours(count=5)
    evaluation.run(specs(data), model, params, processor)
    err = capsys.readouterr().err
    assert "colours 5/5" in err and "examples/s" in err


def test_limit(model, params, processor, colours):
    data, _ = colours(count=9)
    plan = evaluation.prepare(specs(data), limit=4)
    assert [evaluator.size for evaluator, _ in plan.evaluators.values()] == [4, 4]
    with pytest.raises(UserError, match="--limit"):
        evaluation.prepare(specs(data), limit=0)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("a", {"kind": "zero-shot"}, "did you mean 'zero_shot'"),
        ("a", {}, "unknown evaluation None"),
        ("a", "zero_shot", "expected a mapping"),
        ("../a", {"kind": "retrieval"}, "is not a name"),
        (".a", {"kind": "retrieval"}, "is not a name"),
        ("a", {"kind": "retrieval"}, "config.eval.a.data is required"),
        ("a", {"kind": "retrieval", "data": {}, "caption": 1}, "did you mean 'captions'"),
        ("a", {"kind": "retrieval", "data": {}, "captions": "five"}, "config.eval.a.captions: expected"),
        ("a", {"kind": "retrieval", "data": {}, "captions": 0}, "captions: expected at least 1"),
        ("a", {"kind": "retrieval", "data": {}, "batch_size": 0}, "batch_size of at least 1"),
        ("a", {"kind": "retrieval", "data": {}, "bootstrap": {"resamples": -1}}, "resamples"),
        ("a", {"kind": "retrieval", "data": {"kind": "tfd"}}, "config.eval.a.data: .*unknown kind 'tfd'"),
        ("a", {"kind": "retrieval", "data": {"kind": "jsonl", "path": "/nowhere.jsonl"}}, "/nowhere.jsonl"),
        ("a", {"kind": "embeddings", "data": {}, "shard_size": 0}, "shard_size"),
        ("a", {"kind": "linear_probe", "train": {}, "data": {}, "solver": "svm"}, "'lbfgs', 'sklearn'"),
    ],
)
def test_wrong_settings_are_one_line(name, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluation.prepare({name: spec})
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_is_named_before_any_work(model, params, processor, colours):
    data, _ = colours(count=4)
    wrong = params | {"projection": jnp.zeros((5, 8))}
    with pytest.raises(UserError, match="cannot encode an image: dot_general"):
        evaluation.run(specs(data), model, wrong, processor)
    with pytest.raises(UserError, match="no tokenizer and image settings"):
        evaluation.run(specs(data), model, params, None)


def test_outputs_that_cannot_be_written(model, params, processor, colours, tmp_path):
    data, _ = colours(count=4)
    (tmp_path / "file").write_text("")
    (tmp_path / "dir.json").mkdir()
    for name, message in [("x.txt", "ends in .json"), ("file/x.json", "cannot write"), ("dir.json", "is a folder")]:
        with pytest.raises(UserError, match=message):
            evaluation.run(specs(data), model, params, processor, output=tmp_path / name)


def test_a_failure_leaves_no_file(model, params, processor, colours, tmp_path):
    data, _ = colours(count=9, label=lambda i: 99 if i == 7 else i % 5)
    with pytest.raises(UserError, match="config.eval.colours: .*label 99"):
        evaluation.run(specs(data), model, params, processor, output=tmp_path / "out" / "r.json", progress=False)
    assert not (tmp_path / "out").exists()


def test_embeddings_that_are_not_numbers_are_named(model, params, processor, colours):
    data, _ = colours(count=4)
    with pytest.raises(UserError, match="config.eval.colours: .* text embeddings are not finite"):
        evaluation.run(specs(data), model, jax.tree.map(lambda x: x * np.nan, params), processor, progress=False)
