"""Extraction writes every row once, in files of equal size, with what it belongs to."""

import dataclasses
import json

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.extract import Extract, ExtractConfig


def read(folder, name):
    files = sorted(folder.glob(f"{name}-*.npy"))
    rows = [json.loads(line) for f in files for line in f.with_suffix(".jsonl").read_text().splitlines()]
    return [np.load(f) for f in files], rows


def test_images_and_texts(model, params, processor, colours, tmp_path):
    spec, _ = colours(count=10, broken=(2,))
    task = Extract.prepare(ExtractConfig(spec, text="text", shard_size=4), "config.eval.e")
    embedder = Embedder(model, params, processor, batch_size=3)
    result = dataclasses.replace(task, folder=tmp_path / "out")(embedder)
    images, rows = read(tmp_path / "out", "image")
    assert [len(part) for part in images] == [4, 4, 1]
    assert [row["index"] for row in rows] == [0, 1, 3, 4, 5, 6, 7, 8, 9] and rows[2]["key"] == "k3"
    expected, _ = embedder.all_images(task.source, lambda example: {})
    np.testing.assert_array_equal(np.concatenate(images), expected)
    texts, text_rows = read(tmp_path / "out", "text")
    assert [row["text"] for row in text_rows[:3]] == ["red", "dark red", "green"]
    np.testing.assert_allclose(np.concatenate(texts), embedder.texts([row["text"] for row in text_rows]), atol=1e-6)
    assert result.metrics == {"images": 9.0, "texts": 18.0} and result.unreadable == 1
    assert sorted(result.details["files"]) == sorted(p.name for p in (tmp_path / "out").glob("*.npy"))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_second_extraction_replaces_the_first(model, params, processor, colours, tmp_path):
    spec, _ = colours(count=5)
    for size in (1, 3):
        task = Extract.prepare(ExtractConfig(spec, shard_size=size), "config.eval.e")
        dataclasses.replace(task, folder=tmp_path)(Embedder(model, params, processor))
    assert [len(part) for part in read(tmp_path, "image")[0]] == [3, 2]


def test_a_failure_leaves_nothing(model, params, processor, colours, tmp_path):
    spec, _ = colours(count=6, text=lambda i: "red" if i < 5 else "")
    task = Extract.prepare(ExtractConfig(spec, text="text", shard_size=2), "config.eval.e")
    with pytest.raises(UserError, match="expected a text"):
        dataclasses.replace(task, folder=tmp_path / "out")(Embedder(model, params, processor, batch_size=2))
    assert not list((tmp_path / "out").glob("*")) + list((tmp_path / "out").glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(model, params, processor, colours, tmp_path, monkeypatch):
    spec, _ = colours(count=5)
    task = Extract.prepare(ExtractConfig(spec, shard_size=2), "config.eval.e")
    save, calls = np.save, []

    def full(file, array):
        calls.append(file.write(b"half"))
        return save(file, array) if len(calls) == 1 else (_ for _ in ()).throw(OSError(28, "No space left on device"))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="^No space left on device$"):
        dataclasses.replace(task, folder=tmp_path / "out")(Embedder(model, params, processor, batch_size=2))
    assert len(calls) == 2 and not list((tmp_path / "out").iterdir())


def test_without_a_folder_nothing_is_written(model, params, processor, colours):
    spec, _ = colours(count=5)
    task = Extract.prepare(ExtractConfig(spec), "config.eval.e")
    assert task(Embedder(model, params, processor)).metrics == {"images": 5.0, "texts": 0.0}
