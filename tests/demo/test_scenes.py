"""The two-digit scenes: true captions and answers, no scan in both splits, a vocabulary without unknown words."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from vlm import tokenizers
from vlm.demo import scenes
from vlm.demo.prepare import load_scans, split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", {"train": 60, "test": 40})
        return scenes.prepare_scenes(tmp_path_factory.mktemp("scenes") / "scenes")


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_captions_and_answers_say_what_was_drawn():
    assert scenes.caption(5, 8) == "a five on the left and an eight on the right"
    answers = dict(scenes.questions(5, 8, named=3))
    assert answers == {
        "which digit is on the left?": "five",
        "which digit is on the right?": "eight",
        "which digit is larger?": "eight",
        "what is the sum of the digits?": "thirteen",
        "are the digits equal?": "no",
        "is there a three?": "no",
    }
    assert dict(scenes.questions(9, 9, named=9))["are the digits equal?"] == "yes"


def test_each_half_holds_one_whole_scan_of_its_own_split(folder):
    scans, labels = load_scans()
    for name, rows in split(labels, 0).items():
        known = scans[rows].reshape(len(rows), -1).astype(float)
        for row in read(folder, f"caption_{name}.json")[:20]:
            paper = np.asarray(Image.open(folder / row["image"]), float)
            digits = []
            for half in (paper[:, :12], paper[:, 12:]):
                windows = [half[r : r + 8, c : c + 8].reshape(-1) for r in range(0, 17, 4) for c in (0, 4)]
                distances = np.array([np.abs(known - window).mean(axis=1) for window in windows])
                closest = distances.min(axis=0).argmin()
                assert distances.min() == 0 if name == "test" else distances.min() < 30
                digits.append(labels[rows[closest]])
            assert scenes.caption(*digits) in row["caption"]


def test_variation_keeps_the_digit_and_changes_the_picture():
    scans, _ = load_scans()
    varied = scenes.vary(scans[0], np.random.default_rng(0))
    assert 2 < np.abs(varied.astype(float) - scans[0]).mean() < 40
    assert np.corrcoef(varied.reshape(-1), scans[0].reshape(-1))[0, 1] > 0.9


def test_files_have_the_published_form(folder):
    test, gt = read(folder, "caption_test.json"), read(folder, "caption_test_gt.json")
    assert [row["image_id"] for row in test] == [row["id"] for row in gt["images"]] == list(range(40))
    assert [row["caption"][0] for row in test] == [row["caption"] for row in gt["annotations"]]
    asked = read(folder, "vqa_test.json")
    assert len(asked) == 40 * scenes.QUESTIONS_PER_SCENE and {len(row["answer"]) for row in asked} == {10}
    assert {answer for row in asked for answer in row["answer"]} <= set(read(folder, "answer_list.json"))


def test_the_vocabulary_knows_every_word(folder):
    tokenizer = tokenizers.load(folder / "tokenizer")
    texts = [scenes.PROMPT + scenes.caption(8, 1), *scenes.NUMBERS, "is there an eight?", "yes", "no"]
    tokens = tokenizer(texts)["tokens"]
    assert tokenizer.unk_id not in tokens
    assert tokenizer.vocab_size == len(scenes.vocabulary())


def test_a_folder_that_is_there_is_kept(folder):
    before = (folder / "vqa_train.json").stat().st_mtime_ns
    assert scenes.prepare_scenes(folder) == folder and (folder / "vqa_train.json").stat().st_mtime_ns == before
