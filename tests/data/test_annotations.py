"""The list of candidate answers; published forms are tested through their source (test_json_list.py)."""

import json

import pytest

from vlm.data.annotations import frequent_answers, read_answer_list
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


def test_frequent_answers(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text(json.dumps({"info": {}, "annotations": rows}))
        return str(tmp_path / name)

    said = [{"multiple_choice_answer": text, "question_id": i} for i, text in enumerate(("no", "Yes", "yes", "red"))]
    others = [
        {"answers": [{"answer": text} for text in texts]} for texts in (("2", "blue", "blue"), ("no", "2"), (" ",))
    ]
    paths = write("a.json", *said), write("b.json", *others)
    assert frequent_answers(paths, 4) == ["no", "yes", "blue", "red"]
    assert frequent_answers(paths[:1], 1) == ["yes"]
    with pytest.raises(UserError, match="at least 5 different answers, found 4"):
        frequent_answers(paths, 5)
    (tmp_path / "q.json").write_text('{"questions": [{"question_id": 1}]}')
    with pytest.raises(UserError, match=r"q.json: expected VQA annotations, found none"):
        frequent_answers([str(tmp_path / "q.json")], 1)
    with pytest.raises(UserError, match="annotations record 1: no 'answers'"):
        frequent_answers([write("c.json", {"question_id": 1})], 1)
