"""The list of candidate answers; published forms are tested through their source (test_json_list.py)."""

import json

import pytest

from vlm.data.annotations import read_answer_list
from vlm.errors import UserError


def test_answer_list(tmp_path):
    path = tmp_path / "answer_list.json"
    path.write_text(json.dumps(["yes", "no", "café"], ensure_ascii=False), encoding="utf-8")
    assert read_answer_list(str(path)) == ["yes", "no", "café"]
    for content, message in (
        (["yes", 3], "record 2: expected an answer, found 3"),
        (["a", "b", "a"], "found 'a' twice"),
        ([], "found none"),
        ({"answers": ["a"]}, "record 1: expected an answer"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_answer_list(str(path))
