"""VQA accuracy: the official tool's answers, one by one."""

import gzip
import json

import pytest

from vlm.errors import UserError
from vlm.evaluation.metrics import vqa


def annotated(*answers, ids=True):
    return [{"answer": answer} | ({"answer_id": i + 1} if ids else {}) for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Cat.", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("ten a an", "10"),
        ("1,000", "1000"),
        ("1,000-5", "10005"),  # a comma between digits removes every mark
        ("a-b", "b"),
        ("x-b", "x b"),
        ("x -b", "x b"),
        ("x - b/c", "x b c"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("3.x", "3x"),  # meant to stay: the official pattern is mistaken
        ("e.g.", "eg"),
        ("dont", "don't"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im Ive", "im ive"),  # the official table lists these in capitals, the words are in lower case
        ("it's", "it's"),
        ("what!? why?", "what why"),
        ("." * 40, "." * 8),  # 32 replacements and no more
    ],
)
def test_normalise(answer, expected):
    assert vqa.normalise(answer) == expected


def test_accuracy_is_the_mean_over_annotators():
    ten = annotated(*["yes"] * 3, *["no"] * 7)
    # 3 say yes: each of them sees two others (2/3), the seven see three (1).
    assert vqa.accuracy("yes", ten) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa.accuracy("no", ten) == 1 and vqa.accuracy("maybe", ten) == 0
    assert vqa.accuracy("yes", annotated("yes", *["no"] * 9)) == pytest.approx(0.3)
    assert vqa.accuracy("yes\n", ten) == vqa.accuracy(" YES", ten) == vqa.accuracy("yes", ten)


def test_modes_of_normalising():
    same = annotated(*["black"] * 10)
    assert vqa.accuracy("Black.", same) == 1
    assert vqa.accuracy("Black.", same, normalise_answers="disagreement") == 0
    assert vqa.accuracy("Black.", annotated(*["black"] * 9, "red"), normalise_answers="disagreement") == 1
    people = annotated(*["two"] * 5, *["2."] * 4, "red, white")
    assert vqa.accuracy("Two", people) == vqa.accuracy("two.", people, normalise_answers="disagreement") == 1
    assert vqa.accuracy("Two", people, normalise_answers="punctuation") == 1  # "2" as four say
    assert vqa.accuracy("two", annotated(*["two"] * 10), normalise_answers="punctuation") == 0
    assert vqa.accuracy("2", annotated(*["2."] * 10), normalise_answers="punctuation") == 0
    assert vqa.accuracy("black", annotated(*["Black"] * 5, *["black!"] * 5), normalise_answers="punctuation") == 0


def test_equal_answers_without_ids_count_once():
    ten = annotated(*["yes"] * 4, *["no"] * 6, ids=False)
    # As is, those who say yes see no other yes at all.
    assert vqa.accuracy("yes", ten) == pytest.approx(0.6)
    assert vqa.accuracy("yes", ten, answer_ids="distinct") == 1
    told_apart = [record | {"answer_confidence": i} for i, record in enumerate(ten)]
    assert vqa.accuracy("yes", told_apart) == 1
    assert vqa.ids_matter({1: {"answers": ten}}) and not vqa.ids_matter({1: {"answers": annotated("a", "b")}})


def test_means_by_type():
    def record(kind, question):
        return {"answers": annotated(*["a cat"] * 10), "answer_type": kind, "question_type": question}

    annotations = {1: record("other", "what"), 2: record("other", "how"), 3: record("number", "how")}
    found = vqa.score({3: "cat", 1: "cat", 2: "dog"}, annotations)
    assert found.accuracy == 66.6667 and found.per_question == {1: 100.0, 2: 0.0, 3: 100.0}
    assert found.per_answer_type == {"number": 100.0, "other": 50.0}
    assert found.per_question_type == {"how": 50.0, "what": 100.0}
    with pytest.raises(UserError, match="question 4 has no annotation"):
        vqa.score({4: "x"}, annotations)


def test_equals_the_official_tool(shared_data):
    golden = json.loads(gzip.decompress((shared_data / "goldens" / "vqa_textvqa.json.gz").read_bytes()))
    file = shared_data / "vqa" / "textvqa_val_annotations_vqa_format.json"
    annotations = {record["question_id"]: record for record in json.loads((file).read_bytes())["annotations"]}
    answers = {record["question_id"]: record["answer"] for record in golden["predictions"]}
    for ids, name in (("as_is", "official_as_is"), ("distinct", "with_answer_id")):
        found = vqa.score(answers, annotations, answer_ids=ids)
        assert {str(question): value for question, value in found.per_question.items()} == golden[
            f"per_question_{name}"
        ]
        assert found.accuracy == golden[f"overall_{name}"]
        assert found.per_answer_type == {"other": found.accuracy}
