"""Captions of a random model: the same text per image whatever the batch and the mesh, scored as the metrics say."""

import json

import jax
import pytest

from vlm import evaluation
from vlm.errors import UserError
from vlm.evaluation.metrics import captions, files
from vlm.evaluation.writing import generation_config
from vlm.generation import generate, prepare


@pytest.fixture
def spec(scenes_folder):
    data = {"kind": "json", "path": str(scenes_folder / "caption_test.json"), "split": "[:9]"}
    generation = {"preset": "greedy", "generation": {"max_new_tokens": 3}}
    return {"kind": "captions", "data": data, "bootstrap": {"resamples": 10}, "batch_size": 4} | generation


def test_the_same_in_any_batch_and_on_a_mesh(tiny_blip, spec, tmp_path, mesh8):
    model, params, processor = tiny_blip("caption")
    output = tmp_path / "r.json"
    metrics = evaluation.run({"c": spec}, model, params, processor, output=output, progress=False)
    official = files.caption_results(tmp_path / "r.c.results.json")
    source = evaluation.prepare({"c": spec}).evaluators["c"][0].source
    references = {}
    prepared = prepare(model, params)
    for rows in ((8, 0, 5, 1), (2, 7, 4, 3), (6, 1, 6, 2)):  # in other company than the evaluation's
        examples = [source[index] for index in rows]
        batch = processor(images=[example["image"] for example in examples], texts=["a picture of "] * 4)
        found = generate(model, prepared, batch, max_new_tokens=3)
        for example, ids in zip(examples, found.completions, strict=True):
            assert official[example["image_id"]] == processor.tokenizer.decode(ids.tolist())
            references[example["image_id"]] = example["caption"]
    assert len(official) == 9 and len(set(official.values())) > 1
    for name, value in captions.score(official, references).metrics.items():
        assert metrics[f"c/{name}"] == pytest.approx(value)
    assert metrics["c/exact_match"] == 0
    rows = [json.loads(line) for line in (tmp_path / "r.c.jsonl").read_text().splitlines()]
    assert rows[3]["caption"] == official[3] and rows[3]["captions"] == references[3]
    assert {"cider", "exact_match"} <= set(json.loads(output.read_text())["evaluations"]["c"]["intervals_95"])
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png") == 9 and official[3] in page
    with jax.set_mesh(mesh8):
        assert evaluation.run(
            {"c": spec | {"batch_size": 7}}, model, params, processor, progress=False
        ) == pytest.approx(metrics)


def test_examples_of_one_image_are_scored_together(tiny_blip, spec, scenes_folder, tmp_path):
    rows = json.loads((scenes_folder / "caption_test.json").read_text())[:3]
    (tmp_path / "images").symlink_to(scenes_folder / "images")
    records = [{"image": row["image"], "caption": row["caption"][0], "img_id": n // 2} for n, row in enumerate(rows)]
    for n, record in enumerate(records):
        record["domain"] = ("in-domain", "in-domain", "out-domain")[n]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = {"kind": "json", "path": str(tmp_path / "data.json"), "root": str(scenes_folder)}
    spec |= {"data": data, "domain": "domain"}
    metrics = evaluation.run({"c": spec}, *tiny_blip("caption"), output=tmp_path / "r.json", progress=False)
    assert {"c/in/cider", "c/out/cider", "c/cider"} <= metrics.keys() and "c/near/cider" not in metrics
    found = json.loads((tmp_path / "r.c.results.json").read_text())
    assert [row["image_id"] for row in found] == [0, 1]
    row = json.loads((tmp_path / "r.c.jsonl").read_text().splitlines()[0])
    assert row["captions"] == [rows[0]["caption"][0], rows[1]["caption"][0]]


def test_an_exact_caption_counts(tiny_blip, spec, monkeypatch):
    from vlm.evaluation import writing

    said = iter(["A Five on the left.", "nothing"] * 8)
    monkeypatch.setattr(writing.Writer, "__call__", lambda self, batch: [next(said) for _ in range(4)])
    model, params, processor = tiny_blip("caption")
    evaluator = evaluation.prepare({"c": spec}).evaluators["c"][0]
    usual = type(evaluator).note
    monkeypatch.setattr(type(evaluator), "note", lambda s, e: usual(s, e) | {"captions": ["x", "a five on the left"]})
    assert evaluation.run({"c": spec}, model, params, processor, progress=False)["c/exact_match"] == pytest.approx(
        5 / 9
    )


def test_presets():
    coco = generation_config("coco", {}, "g")
    assert (coco.num_beams, coco.max_length, coco.min_length, coco.repetition_penalty) == (3, 20, 5, 1.0)
    assert generation_config("nocaps", {}, "g").repetition_penalty == 1.1
    assert generation_config("coco", {"max_new_tokens": 7}, "g").max_length is None
    assert [generation_config("coco", {"max_length": n}, "g").min_length for n in (4, 5)] == [0, 5]
    with pytest.raises(UserError, match="num_beam.* did you mean 'num_beams'"):
        generation_config("coco", {"num_beam": 2}, "g")


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["val2014/COCO_val2014_000000391895.jpg", "val2014/COCO_val2014_000000522418.jpg"], [391895, 522418]),
        (["a/1.jpg", "b/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
    ],
)
def test_ids_of_files_are_those_that_the_score_command_reads(tmp_path, names, ids):
    """Karpathy's lists as BLIP ships them have no ids: COCO's number is in the file's name."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"picture")
    records = [{"image": name, "caption": [f"a {name}", "a dog"]} for name in names]
    (tmp_path / "test.json").write_text(json.dumps(records))
    spec = {"kind": "captions", "data": {"kind": "json", "path": str(tmp_path / "test.json")}}
    evaluator = evaluation.prepare({"c": spec}).evaluators["c"][0]
    notes = [{"index": i} | evaluator.note(evaluator.source[i]) for i in range(2)]
    found = evaluator._result(notes, ["a dog", "a cat"])
    assert [row["image_id"] for row in found.official] == ids
    (tmp_path / "results.json").write_text(json.dumps(found.official))
    references = files.caption_references(tmp_path / "test.json").captions
    again = captions.score(files.caption_results(tmp_path / "results.json"), references)
    assert list(references) == ids and again.metrics["rouge_l"] == found.metrics["rouge_l"] > 0


def test_own_ids_come_before_those_of_files(tmp_path):
    """As in NoCaps' lists (`img_id`) and where a setting names the field."""
    (tmp_path / "7.jpg").write_bytes(b"picture")
    (tmp_path / "val.json").write_text(
        json.dumps([{"image": "7.jpg", "caption": "a", "img_id": "03", "name": "x9.jpg"}])
    )
    for setting, expected in ((None, 3), ("name", 9), ("img_id", 3)):
        data = {"kind": "json", "path": str(tmp_path / "val.json")}
        evaluator = evaluation.prepare({"c": {"kind": "captions", "data": data, "image_id": setting}}).evaluators["c"][
            0
        ]
        assert evaluator.note(evaluator.source[0])["image_id"] == expected
    assert list(files.caption_references(tmp_path / "val.json").captions) == [3]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("retrieval", {}, "config.eval.c: .*no decoder"),
        ("vqa", {}, "config.eval.c: .*questions"),
        ("caption", {"captions": "words"}, "no field 'words'"),
        ("caption", {"metrics": ("rouge",)}, "metrics: expected some of"),
        ("caption", {"generation": {"num_return_sequences": 2, "num_beams": 2}}, "one text per example"),
    ],
)
def test_wrong_settings(tiny_blip, spec, task, change, message):
    with pytest.raises(UserError, match=message) as caught:
        evaluation.run({"c": spec | change}, *tiny_blip(task), progress=False)
    assert "\n" not in str(caught.value)
