"""VisDial's files as rounds: history, candidates, the right one, dense annotations, images by split."""

import json

import numpy as np
import pytest

from vlm.data.source import open_source
from vlm.errors import UserError


def write(folder, picture=b"png", options=4, split="val2018"):
    """Two dialogs of three and one rounds about images 7 and 12; returns the paths of the file and its annotations."""
    questions = ["is it a dog", "what colour is it?", "how many are there", "is it a five"]
    answers = ["yes", "no", "two", "brown", "a cat"]

    def turn(question, right):
        given = [(right + k) % len(answers) for k in range(options)]
        return {"question": question, "answer": right, "answer_options": given[::-1], "gt_index": options - 1}

    dialogs = [
        {"image_id": 7, "caption": "A dog, running.", "dialog": [turn(0, 0), turn(1, 3), turn(2, 2)]},
        {"image_id": 12, "caption": "two cats", "dialog": [turn(3, 1)]},
    ]
    data = {"dialogs": dialogs, "questions": questions, "answers": answers}
    (folder / "visdial.json").write_text(json.dumps({"version": "1.0", "split": split, "data": data}))
    dense = [{"image_id": 7, "round_id": 2, "gt_relevance": [0, 0.5, *[0] * (options - 3), 1]}]
    (folder / "dense.json").write_text(json.dumps(dense))
    for name in ("VisualDialog_val2018/VisualDialog_val2018", "train2014/COCO_train2014", "val2014/COCO_val2014"):
        place = folder / name.split("/")[0]
        place.mkdir(exist_ok=True)
        for number in (7, 12):
            if number == 7 or not name.startswith("train"):
                (folder / f"{name}_{number:012d}.jpg").write_bytes(picture)
    return folder / "visdial.json", folder / "dense.json"


def spec_of(paths):
    return {"kind": "visdial", "path": str(paths[0]), "annotations": str(paths[1])}


def test_rounds_have_their_history_and_candidates(tmp_path):
    source = open_source(spec_of(write(tmp_path)))
    assert len(source) == 4
    third = source[2]
    assert third["history"] == [["is it a dog", "yes"], ["what colour is it?", "brown"]]
    assert (third["question"], third["caption"], third["image"]) == ("how many are there", "A dog, running.", b"png")
    assert third["options"] == ["yes", "a cat", "brown", "two"] and third["options"][third["answer"]] == "two"
    assert "relevance" not in third and source[1]["relevance"] == [0, 0.5, 0, 1]
    last = source[3]
    assert last["history"] == [] and (last["image_id"], last["round"], last["key"]) == (12, 1, "12:1")


def test_training_images_are_in_both_parts_of_coco(tmp_path):
    source = open_source(spec_of(write(tmp_path, split="train")))
    (tmp_path / "val2014/COCO_val2014_000000000012.jpg").write_bytes(b"other")
    assert [source[index]["image"] for index in (0, 3)] == [b"png", b"other"]
    (tmp_path / "val2014/COCO_val2014_000000000012.jpg").unlink()
    with pytest.raises(UserError, match="COCO_val2014_000000000012.jpg"):
        source[3]


def test_a_test_split_has_candidates_in_the_last_round_alone(tmp_path):
    spec = spec_of(write(tmp_path))
    content = json.loads((tmp_path / "visdial.json").read_text())
    rounds = content["data"]["dialogs"][0]["dialog"]
    for number, turn in enumerate(rounds):
        del turn["gt_index"]
        turn.pop("answer_options" if number < 2 else "answer")
    (tmp_path / "visdial.json").write_text(json.dumps(content))
    source = open_source(spec | {"annotations": None})
    assert len(source) == 2 and "answer" not in source[0] and len(source[0]["history"]) == 2
    assert np.shape(source[0]["options"]) == (4,)


def _change(content, dense, kind):
    rounds = content["data"]["dialogs"][0]["dialog"]
    if kind == "options":
        rounds[1]["answer_options"].pop()
        rounds[1]["gt_index"] = 0
    elif kind == "number":
        rounds[0]["answer_options"][0] = 5
    elif kind == "right":
        rounds[0]["gt_index"] = 4
    elif kind == "answer":
        del rounds[0]["answer"]
    elif kind == "words":
        rounds[0]["answer_options"][0] = "yes"
    elif kind == "dialog":
        del content["data"]["dialogs"][1]["caption"]
    elif kind == "none":
        content["data"] = {"questions": ["a"]}
    elif kind == "image":
        dense[0]["image_id"] = 8
    else:
        dense[0]["gt_relevance"] = [1.0]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("options", "expected 4 answer_options, as before, found 3"),
        ("number", "answers: expected one of number 5, found 5"),
        ("right", "dialogs record 1: no dialog of VisDial"),
        ("answer", "dialogs record 1: no dialog of VisDial"),
        ("words", "dialogs record 1: no dialog of VisDial"),
        ("dialog", "dialogs record 2: no dialog of VisDial"),
        ("none", "expected VisDial's dialogs with answer_options, found none"),
        ("image", r"dense.json: record 1: expected a round of .* found \(8, 2\)"),
        ("relevance", "dense.json: record 1: expected gt_relevance of 4 options"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, kind, message):
    spec = spec_of(write(tmp_path))
    content, dense = (json.loads((tmp_path / name).read_text()) for name in ("visdial.json", "dense.json"))
    _change(content, dense, kind)
    for name, value in (("visdial.json", content), ("dense.json", dense)):
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        open_source(spec)
