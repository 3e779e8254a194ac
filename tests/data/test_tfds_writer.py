import pathlib

import pytest
import tensorflow_datasets as tfds

from vlm.data.tfds import TfdsSource
from vlm.data.tfds_writer import write_tfds
from vlm.errors import UserError

GOOD = {"image": b"\x89PNG", "label": 1, "score": 0.5, "text": "a"}
FEATURES = {"image": "image", "label": "int", "score": "float", "text": "text"}


def test_round_trip_in_order_and_readable_by_tfds(tmp_path, capfd):
    examples = [{**GOOD, "label": i} for i in range(30)]
    folder = write_tfds(tmp_path, "toy", {"train": iter(examples), "val": examples[:2]}, FEATURES)
    assert folder == str(tmp_path / "toy" / "1.0.0") and capfd.readouterr().out == ""
    source = TfdsSource(folder, "train")
    assert [source[i]["label"] for i in range(30)] == list(range(30))
    assert source[0]["image"] == b"\x89PNG" and source[0]["score"] == 0.5
    assert tfds.builder_from_directory(folder).info.splits["val"].num_examples == 2


@pytest.mark.parametrize(
    "name, examples, features, message",
    [
        ("Toy!", [GOOD], FEATURES, "dataset name 'Toy!'"),
        ("toy", [GOOD], {**FEATURES, "text": "txet"}, "feature 'text': unknown kind 'txet'; did you mean 'text'"),
        ("toy", [], FEATURES, "split 'train' is empty"),
        ("toy", [GOOD, {"text": "a"}], FEATURES, "split 'train' example 1: has \\['text'\\], the features are"),
        ("toy", [{**GOOD, "image": 3}], FEATURES, "an image must be its encoded bytes, found int"),
        ("toy", [{**GOOD, "label": "x"}], FEATURES, "cannot write"),
        (
            "toy",
            [{**GOOD, "text": [["a"], ["b", "c"]]}],
            {**FEATURES, "text": [["text"]]},
            "No module named 'tensorflow'",
        ),
    ],
)
def test_wrong_input_leaves_no_dataset(tmp_path, name, examples, features, message):
    with pytest.raises(UserError, match=message):
        write_tfds(tmp_path, name, {"train": examples}, features)
    assert not list(pathlib.Path(tmp_path).rglob("*.array_record*"))
    assert not (tmp_path / name / "1.0.0").exists()


def test_existing_dataset_is_kept(tmp_path):
    write_tfds(tmp_path, "toy", {"train": [GOOD]}, FEATURES)
    with pytest.raises(UserError, match="already there"):
        write_tfds(tmp_path, "toy", {"train": [GOOD]}, FEATURES)
