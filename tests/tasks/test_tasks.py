"""All tasks on made-up data of every kind: fine-tuned, probed, zero-shot; the table; reading back; what is absent."""

import dataclasses
import io
import json
import pathlib
import tarfile

import jax
import pytest
from sklearn.metrics import roc_auc_score

import vlm
from vlm import evaluation, sharding
from vlm.config import load
from vlm.data.source import open_source
from vlm.errors import UserError
from vlm.experiment import experiment
from vlm.loading import open_model
from vlm.models import get_family
from vlm.schema import Config
from vlm.strict import build
from vlm.tasks import main, running, table
from vlm.tasks.fitting import fitted
from vlm.tasks.settings import read

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "flava_tasks.py"
SAID = ("there is a five", "there is a two left of a nine", "a three", "a nine above a two")
RUN = ("mnist", "stsb", "flickr30k", "imagenet_zero_shot")
SMALL = f"""
import runpy
from ml_collections import ConfigDict

CHANGES = {{
    "data": {{"batch_size": 8, "num_workers": 0}},
    "precision": {{"compute": "float32"}},
    "optimizer": {{"schedule": {{"warmup_steps": 1}}}},
    "train": {{"steps": 2, "tensorboard": False, "sample_images": 0}},
}}


def merged(a, b):
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return b
    return {{**a, **{{key: merged(a.get(key), value) for key, value in b.items()}}}}


def get_config():
    config = runpy.run_path({str(CONFIG)!r})["get_config"]().to_dict()
    for task in config["tasks"]:
        if task.get("train"):
            task["train"] = {str(CONFIG.parent)!r} + "/" + task["train"]
            task["changes"] = merged(task["changes"], CHANGES)
        for spec in task["eval"].values():
            spec.update({{"batch_size": 8, "bootstrap": {{"resamples": 5}}}})
        if task["key"] == "vqa":
            task["answers"]["count"] = 3
            task["changes"]["processor"] = {{"image": {{"size": 32, "crop": None, "mode": "exact"}}}}
        if task["key"] == "imagenet_zero_shot":
            task["eval"]["zero_shot"] |= {{"data": {{"kind": "json", "path": "data/zero.json"}}, "dataset": None}}
            task["eval"]["zero_shot"] |= {{"classnames": ("five", "two"), "templates": ("a {{c}}",)}}
    return ConfigDict(config)
"""


def tsv(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n")


def glue(folder):
    """The eight tasks' files with the columns that they are published with."""
    sentences = [(SAID[i % 4], SAID[(i + i // 4) % 4]) for i in range(10)]
    for part in ("train", "dev"):
        rows = enumerate(sentences)
        tsv(
            folder / f"CoLA/{part}.tsv",
            None,
            *(("gj04", str(i % 2), "*", f'{a} "') for i, (a, _) in enumerate(sentences)),
        )
        tsv(folder / f"SST-2/{part}.tsv", ("sentence", "label"), *((a, str(i % 2)) for i, (a, _) in rows))
        rows = [(str(i % 2), str(i), str(i), a, b) for i, (a, b) in enumerate(sentences)]
        tsv(folder / f"MRPC/{part}.tsv", ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"), *rows)
        rows = [(str(i), "1", "2", a, b, str(i % 2)) for i, (a, b) in enumerate(sentences)]
        header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        tsv(folder / f"QQP/{part}.tsv", header, *rows[:4], ("broken",), *rows[4:])
        rows = [(str(i), "g", "f", "2012", "7", "x", "y", a, b, f"{i % 6}.800") for i, (a, b) in enumerate(sentences)]
        header = (
            "index",
            "genre",
            "filename",
            "year",
            "old_index",
            "source1",
            "source2",
            "sentence1",
            "sentence2",
            "score",
        )
        tsv(folder / f"STS-B/{part}.tsv", header, *rows)
        for name, columns in (("QNLI", ("question", "sentence")), ("RTE", ("sentence1", "sentence2"))):
            rows = [(str(i), a, b, ("entailment", "not_entailment")[i % 2]) for i, (a, b) in enumerate(sentences)]
            tsv(folder / f"{name}/{part}.tsv", ("index", *columns, "label"), *rows)
    for part in ("train", "dev_matched", "dev_mismatched"):
        labels = ("neutral", "entailment", "contradiction")
        rows = [(str(i), "g", a, b, "neutral", labels[i % 3]) for i, (a, b) in enumerate(sentences)]
        tsv(folder / f"MNLI/{part}.tsv", ("index", "genre", "sentence1", "sentence2", "label1", "gold_label"), *rows)


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_text(lines)


@pytest.fixture(scope="module")
def data(tmp_path_factory, scenes_folder):
    folder = tmp_path_factory.mktemp("tasks") / "made_up"
    glue(folder / "glue")
    pictures = [path.read_bytes() for path in sorted((scenes_folder / "images").glob("test_*.png"))[:12]]
    for i, picture in enumerate(pictures):
        names = [f"coco/{part}/COCO_{part}_{i:012d}.jpg" for part in ("train2014", "val2014")]
        names += [f"{i}.png", f"flickr30k/{i}.png", f"hateful_memes/img/{i}.png", f"flickr30k/flickr30k_images/{i}.jpg"]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture)
    for part in ("train", "test_seen"):
        rows = [{"id": i, "img": f"img/{i}.png", "label": i % 2, "text": SAID[i % 4]} for i in range(8)]
        dump(folder / f"hateful_memes/{part}.jsonl", rows)
    for part in ("train", "test"):
        label = ("neutral", "contradiction", "entailment")
        rows = [
            {"Flickr30K_ID": str(i), "sentence1": "", "sentence2": SAID[i % 4], "gold_label": label[i % 3]}
            for i in range(8)
        ]
        dump(folder / f"snli_ve/snli_ve_{part}.jsonl", rows)
    for part in ("train2014", "val2014"):
        asked = [{"question_id": 10 + i, "image_id": i, "question": SAID[i % 4]} for i in range(8)]
        names = ("yes", "no", "five", "rare")
        answered = [
            {"question_id": 10 + i, "answer_type": "other", "multiple_choice_answer": names[i % 7 % 4],
             "answers": [{"answer": names[i % 7 % 4], "answer_id": n} for n in range(10)]}
            for i in range(8)
        ]  # fmt: skip
        dump(folder / f"vqa/v2_OpenEnded_mscoco_{part}_questions.json", {"data_subtype": part, "questions": asked})
        dump(folder / f"vqa/v2_mscoco_{part}_annotations.json", {"annotations": answered})
    captions = [{"image": f"{i}.png", "caption": [SAID[i % 4], f"{SAID[i % 4]} left"]} for i in range(6)]
    dump(folder / "flickr30k/flickr30k_test.json", captions)
    dump(folder / "zero.json", [{"image": f"{i}.png", "label": i % 2} for i in range(6)])
    for part in ("train", "test"):
        (folder / f"wds_mnist/{part}").mkdir(parents=True)
        with tarfile.open(folder / f"wds_mnist/{part}/0.tar", "w") as archive:
            for i in range(12):
                for suffix, content in (("png", pictures[i % 2]), ("cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def config(data):
    path = data.parent / "small_tasks.py"
    path.write_text(SMALL)
    return path


def test_published_numbers_give_the_published_averages():
    report = table.report(read(load(str(CONFIG)), "data"), {}, {}, "FLAVA")
    averages = {row["group"]: (row["paper"], row["of"]) for row in report["averages"]}
    assert averages["vision"] == (79.44, 22) and averages["multimodal"] == (69.92, 11)
    assert averages["NLP"] == (pytest.approx(78.19, abs=0.011), 8) and averages["macro"][0] == 75.85
    others = table.report(read(load(str(CONFIG)), "data"), {}, {}, "CLIP 400M")["averages"]
    assert others[0]["paper"] == pytest.approx(50.50, abs=0.011)


def test_every_task_reads_its_files(data, config):
    settings = read(load(str(config)), str(data))
    there = [name for name, task in settings.tasks.items() if not task.absent(str(data))]
    assert set(there) == {*RUN, "vqa", "mnli", "cola", "mrpc", "qqp", "sst2", "qnli", "rte", "snli_ve", "hateful_memes"}
    for name in there:
        task = settings.tasks[name]
        evaluation.prepare(task.eval)
        for source in task.changes.get("data", {}).get("sources", ()):
            opened = open_source(source)
            example = opened[1]
            assert len(opened) == (8 if "image" in example else 10) and isinstance(example["text"], str)
            if name == "stsb":
                assert float(example["label"]) == 1.8
            elif name != "vqa":
                wanted = {"mnli": 0, "qnli": 1, "rte": 1, "snli_ve": 2}.get(name, 1)
                assert example["label"] == wanted, name


def test_training_configurations_fit_the_checkpoint(data, config, tiny_flava, tmp_path):
    vlm.save(tmp_path / "model", *tiny_flava())
    opened = open_model(tmp_path / "model")
    settings = read(load(str(config)), str(data))
    for name, parts in (("mnli", ("text",)), ("vqa", ("vision", "text", "fusion"))):
        task, answers = settings.tasks[name], None
        if task.answers is not None:
            answers = tmp_path / "answers.json"
            running.write_answers(answers, task.answers)
            assert json.loads(answers.read_text()) == ["yes", "five", "no"]
        found = fitted(task, opened, tmp_path / "model", config.parent, str(data), answers)
        made = build(Config, found, "")
        model = experiment(made).model.config
        assert [part for part in ("vision", "text", "fusion") if getattr(model, part) is not None] == list(parts)
        assert model.classifier.num_labels == 3 and not model.heads and model.codebook is None
        assert model.text.hidden_size == 8 and model.text.dtype == "float32" and made.data.batch_size == 8
        assert made.processor["tokenizer"] == str(tmp_path / "model")
        assert made.processor["max_length"] == 24  # not beyond the table of positions
        assert made.init[0].path == str(tmp_path / "model") and set(made.eval) == set(task.eval)
    assert made.processor["image"]["size"] == 32 and model.vision.image_size == 24  # positions are interpolated
    assert made.processor["answers"] == str(answers) and made.processor["num_answers"] == 3
    assert made.processor["patch_size"] == 8
    task = settings.tasks["mnli"]
    wider = dataclasses.replace(task, changes={**task.changes, "model": {"classifier": {"num_labels": 5}}})
    made = build(Config, fitted(wider, opened, tmp_path / "model", config.parent, str(data), None), "")
    assert made.processor["num_labels"] == experiment(made).model.config.classifier.num_labels == 5
    blip = dataclasses.replace(opened, family=get_family("blip"))
    with pytest.raises(UserError, match="trains flava, the checkpoint is blip"):
        fitted(settings.tasks["rte"], blip, tmp_path, config.parent, str(data), None)


def run(capsys, *arguments):
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


def test_runs_prints_and_reads_back(data, config, tiny_flava, tmp_path, capsys, monkeypatch):
    vlm.save(tmp_path / "model", *tiny_flava())
    output = tmp_path / "out"
    command = [f"--config={config}", f"--checkpoint={tmp_path / 'model'}", f"--output={output}", f"--data={data}"]
    status, out, err = run(capsys, *command, f"--only={','.join(RUN)},food101")
    assert status == 0, err
    last = json.loads(out.splitlines()[-1])
    assert last["absent"] == ["food101"] and f"  food101: {data}/wds_food101/test/*.tar, " in out
    found = json.loads((output / "results.json").read_text())
    ours = {(row["task"], row["metric"]): row["ours"] for row in found["rows"] if row["ours"] is not None}
    assert {task for task, _ in ours} == {*RUN} and len(ours) == 7
    values = json.loads((output / "stsb/result.json").read_text())["evaluations"]["dev"]
    assert ours["stsb", "Pearson"] == round(100 * values["metrics"]["pearson"], 2) and values["n"] == 10
    trained = json.loads((output / "stsb/run/config.json").read_text())
    assert trained["model"]["classifier"]["num_labels"] == 1 and trained["model"]["text"]["hidden_size"] == 8
    assert trained["init"][0]["path"] == str(tmp_path / "model") and trained["train"]["steps"] == 2
    probe = json.loads((output / "mnist/result.json").read_text())["evaluations"]["probe"]
    assert probe["features"] == "class_token" and probe["metrics"]["top1"] == 1.0  # the test images were learned
    average = {row["group"]: row for row in found["averages"]}
    assert (average["vision"]["rows"], average["vision"]["paper"]) == (1, 98.42)  # over what ours is over
    assert average["vision"]["difference"] == pytest.approx(1.58)
    line = next(line for line in out.splitlines() if line.startswith("MNIST"))
    assert line.split() == ["MNIST", "accuracy", "98.42", "100.00", "+1.58"]

    monkeypatch.setattr(running, "_evaluate", None)  # nothing is run again
    again = run(capsys, *command, "--only=mnist")[1]
    assert again.split("\n{")[0] == out.split("\n\nabsent data:")[0]
    assert json.loads(again.splitlines()[-1]) == {**last, "absent": []}
    monkeypatch.setattr(running, "_train_function", lambda: lambda config, settings, workdir: 75)
    status, out, _ = run(capsys, *command, "--only=rte,mnist")  # stopped in a training
    assert status == 75 and json.loads(out.splitlines()[-1])["ours"] == last["ours"]
    assert json.loads((output / "rte/task.json").read_text())["metrics"] is None
    status, _, err = run(capsys, *command, "--limit=3")
    assert status == 2 and err.startswith(f"error: --output: {output}/rte is of other settings (another")
    (tmp_path / "model").rename(tmp_path / "moved")  # the same at another path, another at the same
    vlm.save(tmp_path / "model", *_changed(tiny_flava()))
    status, out, _ = run(capsys, *command, f"--checkpoint={tmp_path / 'moved'}", "--only=mnist")
    assert status == 0 and json.loads(out.splitlines()[-1])["ours"] == last["ours"]
    status, _, err = run(capsys, *command, "--only=mnist")
    assert status == 2 and "rte is of another checkpoint (another" in err


@pytest.fixture
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def test_answers_to_questions_from_the_files_to_the_table(data, config, tiny_flava, one_device, tmp_path, capsys):
    """VQA: files as published, training in a larger size, a line per answer, the table; on one device."""
    vlm.save(tmp_path / "model", *tiny_flava())
    output = tmp_path / "out"
    command = [f"--config={config}", f"--checkpoint={tmp_path / 'model'}", f"--output={output}", f"--data={data}"]
    status, out, err = run(capsys, *command, "--only=vqa")
    assert status == 0, err
    ours = json.loads(out.splitlines()[-1])["ours"]

    answers = json.loads((output / "vqa/answers.json").read_text())
    asked = [json.loads(line) for line in (output / "vqa/result.vqa.jsonl").read_text().splitlines()]
    assert len(asked) == 8 and all(row["answer"] in answers and len(row["answers"]) == 10 for row in asked)
    right = [row["answer"] == row["answers"][0] for row in asked]  # all ten people agree
    official = json.loads((output / "vqa/result.vqa.results.json").read_text())
    assert [(row["question_id"], row["answer"]) for row in official] == [(r["question_id"], r["answer"]) for r in asked]
    assert ours["vqa/VQA accuracy"] == round(100 * sum(right) / 8, 2)
    steps = [json.loads(line) for line in (output / "vqa/run/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2 and 0 < steps[-1]["loss"] < 3


@pytest.mark.parametrize(("name", "metric"), [("snli_ve", "accuracy"), ("hateful_memes", "AUROC")])
def test_classes_of_pairs_from_the_files_to_the_table(
    name, metric, data, config, tiny_flava, one_device, tmp_path, capsys
):
    vlm.save(tmp_path / "model", *tiny_flava())
    command = [f"--config={config}", f"--checkpoint={tmp_path / 'model'}", f"--output={tmp_path}", f"--data={data}"]
    status, out, err = run(capsys, *command, f"--only={name}")
    assert status == 0, err
    ours = json.loads(out.splitlines()[-1])["ours"]
    rows = [json.loads(line) for line in (tmp_path / name / "result.test.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [(1, 2, 0)[i % 3] if name == "snli_ve" else i % 2 for i in range(8)]
    shares = [row["probability"] if row["prediction"] else 1 - row["probability"] for row in rows]  # of class 1 of two
    if metric == "accuracy":
        expected = sum(row["prediction"] == row["label"] for row in rows) / 8
    else:
        expected = roc_auc_score([row["label"] for row in rows], shares)
    assert ours[f"{name}/{metric}"] == pytest.approx(100 * expected, abs=0.006)
    steps = [json.loads(line) for line in (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 2 and 0 < steps[-1]["loss"] < 3


def _changed(made):
    """The same model with one other weight."""
    model, params, processor = made
    return model, {**params, "logit_scale": params["logit_scale"] + 1}, processor


@pytest.mark.parametrize(
    "change, message",
    [
        ("--only=clo", "--only: no task 'clo'"),
        ("--compare=CLIP", "--compare: no numbers of 'CLIP'"),
        ("--checkpoint=nowhere", "--checkpoint: no such file or folder: nowhere"),
        (f"--config={ROOT / 'configs' / 'flava.py'}", "config.tasks: expected a tuple of tasks"),
    ],
)
def test_wrong_calls(tmp_path, capsys, change, message):
    command = [f"--config={CONFIG}", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'o'}", "--dry_run", change]
    status, out, err = run(capsys, *command)
    assert status == 2 and err.startswith(f"error: {message}") and not out and not (tmp_path / "o").exists()


def test_a_dry_run_lists_what_is_absent(tmp_path, capsys):
    command = [f"--config={CONFIG}", f"--checkpoint={tmp_path}", f"--output={tmp_path / 'o'}", "--dry_run"]
    status, out, _ = run(capsys, *command, f"--data={tmp_path}", "--only=rte")
    assert status == 0 and f"  rte: {tmp_path}/glue/RTE/dev.tsv, {tmp_path}/glue/RTE/train.tsv" in out
    assert not (tmp_path / "o").exists()
