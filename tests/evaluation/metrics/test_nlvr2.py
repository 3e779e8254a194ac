"""NLVR2: accuracy and consistency."""

import gzip
import json

import pytest

from vlm.errors import UserError
from vlm.evaluation.metrics import files, nlvr2


def test_a_sentence_is_consistent_when_all_its_pairs_are_right():
    labels = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-0-1": True, "dev-2-0-0": True}
    found = nlvr2.score(labels | {"dev-1-1-0": True}, labels)
    # Sentences: (1, 0) with two pairs, (1, 1), (2, 0).
    assert found == {"accuracy": 0.75, "consistency": pytest.approx(2 / 3)}
    assert nlvr2.score(labels, labels) == {"accuracy": 1, "consistency": 1}
    with pytest.raises(UserError, match="none for 'dev-2-0-0'"):
        nlvr2.score({name: True for name in list(labels)[:3]}, labels)
    with pytest.raises(UserError, match="found 'dev-1'"):
        nlvr2.score({"dev-1": True}, {"dev-1": True})


def test_equals_the_official_tool(shared_data):
    golden = json.loads(gzip.decompress((shared_data / "goldens" / "nlvr2_dev.json.gz").read_bytes()))
    labels, sentences = files.nlvr2_labels(shared_data / "nlvr2" / "dev.json")
    found = nlvr2.score({name: word == "True" for name, word in golden["predictions"]}, labels)
    expected = dict(line.split("=") for line in golden["stdout"].split())
    assert {name: str(value) for name, value in found.items()} == expected
