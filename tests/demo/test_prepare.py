import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm import tokenizers
from vlm.data.source import open_source
from vlm.demo import prepare as module
from vlm.demo.phrases import LANGUAGES, captions, pairs
from vlm.demo.prepare import load_scans, prepare, split
from vlm.evaluation.prompts import load_classnames, load_templates

digits = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "digits.py"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def examples(folder, name, **fields):
    source = open_source({"kind": "tfds", "path": str(folder / "digits"), "split": name, "fields": fields or None})
    return [source[index] for index in range(len(source))]


def test_the_same_seed_gives_the_same_files(demo_data, tmp_path):
    first, second = contents(demo_data), contents(prepare(tmp_path / "data"))
    assert first.keys() == second.keys() and len(first) > 20
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_splits_differently():
    labels = load_scans()[1]
    assert not np.array_equal(split(labels, 0)["test"], split(labels, 1)["test"])


def test_splits_are_disjoint_complete_and_balanced(demo_data):
    train, test = examples(demo_data, "train"), examples(demo_data, "test")
    numbers = [example["number"] for example in (*train, *test)]
    assert sorted(numbers) == list(range(1797)) and len(test) == 360
    assert [example["label"] for example in test] == list(range(10)) * 36
    assert min(np.bincount([example["label"] for example in train])) >= 130
    assert sum(a["label"] == b["label"] for a, b in zip(train, train[1:], strict=False)) < 250  # shuffled


def test_an_example_is_its_scan_with_captions_of_its_digit(demo_data):
    scans, labels = load_scans()
    assert scans.shape == (1797, 8, 8) and scans.min() == 0 and scans.max() == 255
    assert scans[:, 0, 0].mean() > 250  # corners are paper
    found = examples(demo_data, "test")
    for example in found:
        image = Image.open(io.BytesIO(example["image"]))
        assert image.format == "PNG" and np.array_equal(np.asarray(image), scans[example["number"]])
        assert example["label"] == labels[example["number"]]
        for code in LANGUAGES:
            assert set(example[code]) < set(captions(code, example["label"])) and len(set(example[code])) == 2
    assert len({text for example in found for text in example["ar"]}) == len(list(pairs("ar")))


def test_parallel_text_and_prompts_are_what_training_and_evaluation_read(demo_data):
    for code, language in LANGUAGES.items():
        source = open_source({"kind": "jsonl", "path": str(demo_data / "parallel" / f"en-{code}.jsonl")})
        read = [(source[i]["text"], source[i]["source_text"]) for i in range(len(source))]
        assert read == [(pair.text, pair.english) for pair in pairs(code)]
        prompts = demo_data / "prompts"
        assert load_classnames(prompts / f"{code}_classnames.json") == list(language.words)
        templates = load_templates(prompts / f"{code}_zeroshot_classification_templates.json")
        assert templates == list(language.phrases)


def test_tokenizers_fit_the_configuration_and_lose_nothing(demo_data):
    config = digits["get_config"]("teacher")
    student = tokenizers.load(demo_data / "tokenizers" / "multilingual")
    assert student.vocab_size == config.model.text.vocab_size
    for code in LANGUAGES:
        texts = [pair.text for pair in pairs(code)]
        batch = student(texts, max_length=99)
        assert batch["tokens"].shape[1] <= config.processor.max_length
        assert not (batch["tokens"] == student.unk_id).any()
        assert len({tuple(row) for row in batch["tokens"]}) == len(texts)
    teacher = tokenizers.load(demo_data / "tokenizers" / "english")
    assert teacher.vocab_size == config.loss.teacher.vocab_size
    assert teacher.eos_id == config.loss.teacher.eos_id
    texts = [pair.text for pair in pairs("en")]
    batch = teacher(texts, max_length=99)
    assert batch["tokens"].shape[1] <= digits["get_config"]("clip").processor.max_length
    assert [teacher.decode(row) for row in batch["tokens"]] == texts


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_images", lambda folder, seed: (folder / "images").mkdir())
    monkeypatch.setattr(module, "write_tokenizers", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(demo_data):
    before = {p: p.stat().st_mtime_ns for p in demo_data.rglob("*")}
    assert prepare(demo_data) == demo_data
    assert {p: p.stat().st_mtime_ns for p in demo_data.rglob("*")} == before
    assert json.loads((demo_data / "prompts" / "es_classnames.json").read_text())["digits"][7] == "siete"
