"""The official files, and what is said about broken ones."""

import json
from functools import partial

import pytest

from vlm.errors import UserError
from vlm.evaluation.metrics import files

COCO = {
    "images": [{"id": 42, "domain": "near-domain"}, {"id": "7", "domain": "in-domain"}],
    "annotations": [
        {"id": 1, "image_id": 42, "caption": "a"},
        {"id": 2, "image_id": "7", "caption": "b"},
        {"id": 3, "image_id": "0042", "caption": "c"},
    ],
}
KARPATHY = {
    "images": [
        {"imgid": 0, "cocoid": 9, "split": "test", "sentences": [{"raw": "A dog.", "sentid": 5}]},
        {"imgid": 1, "cocoid": 8, "split": "restval", "sentences": [{"raw": "A cat.", "sentid": 6}]},
        {"imgid": 2, "cocoid": 4, "split": "test", "sentences": [{"raw": "X", "sentid": 1}, {"raw": "Y", "sentid": 2}]},
    ]
}
LISTS = [
    {"image": "val2014/COCO_val2014_000000000042.jpg", "caption": ["a", "b"]},
    {"image": "flickr30k-images/1007129816.jpg", "caption": ["c"]},
]


@pytest.fixture
def file(tmp_path):
    def write(content, name="f.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_reference_captions_of_three_formats(file):
    found = files.caption_references(file(COCO))
    assert found.captions == {42: ["a", "c"], 7: ["b"]} and found.domains == {42: "near-domain", 7: "in-domain"}
    found = files.caption_references(file(KARPATHY), split="test")
    assert found.captions == {9: ["A dog."], 4: ["X", "Y"]} and found.domains == {}
    assert files.caption_references(file(LISTS)).captions == {42: ["a", "b"], 1007129816: ["c"]}
    same = [{"image": "a/1.jpg", "caption": "a"}, {"image": "b/1.jpg", "caption": "b"}]
    assert files.caption_references(file(same)).captions == {"a/1.jpg": ["a"], "b/1.jpg": ["b"]}


def test_ids_of_images():
    assert files.image_ids(["x/COCO_000042.jpg", "beach.jpg", "y_7_08.png"]) == {
        "x/COCO_000042.jpg": 42, "beach.jpg": "beach", "y_7_08.png": 8
    }  # fmt: skip
    assert files.image_number("7" * 20, "k") == "7" * 20
    for value in (1.5, True, "", None):
        with pytest.raises(UserError, match="k: expected an id"):
            files.image_number(value, "k")


def test_which_texts_belong_to_which_image(file):
    found = files.retrieval_texts(file(LISTS))
    assert found.images == [row["image"] for row in LISTS]
    assert found.texts == [0, 1, 2] and found.text_image == [0, 0, 1]
    found = files.retrieval_texts(file(KARPATHY), split="test")
    assert (found.images, found.texts, found.text_image) == ([0, 2], [5, 1, 2], [0, 1, 1])
    found = files.retrieval_texts(file(COCO))
    assert (found.images, found.texts, found.text_image) == ([42, 7], [1, 3, 2], [0, 0, 1])
    repeated = [{"image": name, "caption": name} for name in "aba"]
    found = files.retrieval_texts(file(repeated))
    assert (found.images, found.texts, found.text_image) == (["a", "b"], [0, 1, 2], [0, 1, 0])


def test_results_and_annotations(file):
    assert files.caption_results(file([{"image_id": "01", "caption": "x"}])) == {1: "x"}
    assert files.vqa_results(file([{"question_id": "a1", "answer": "x"}])) == {"a1": "x"}
    official = {"annotations": [{"question_id": 3, "answers": [{"answer": "x", "answer_id": 1}]}]}
    assert files.vqa_annotations(file(official))[3]["answers"] == [{"answer": "x", "answer_id": 1}]
    plain = files.vqa_annotations(file([{"question_id": 3, "question": "?", "answer": ["x", "y"]}]))
    assert plain[3]["answers"] == [{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}]
    assert files.vqa_annotations(file([{"question_id": 3, "answers": ["x", "y"]}]))[3]["answers"] == plain[3]["answers"]
    assert list(files.vqa_questions(file({"questions": [{"question_id": 3, "question": "?"}]}))) == [3]


def test_nlvr2_files(file):
    lines = '{"identifier": "dev-1-0-0", "label": "True"}\n\n{"identifier": "dev-1-1-0", "label": "False"}\n'
    expected = {"dev-1-0-0": True, "dev-1-1-0": False}
    assert files.nlvr2_labels(file(lines)) == (expected, {"dev-1-0-0": "dev-1--0", "dev-1-1-0": "dev-1--0"})
    plain = [{"sentence": "two dogs", "label": word, "images": ["0.png", "1.png"]} for word in ("True", "False")]
    names = ["f.json:1", "f.json:2"]
    assert files.nlvr2_labels(file(plain)) == ({names[0]: True, names[1]: False}, dict.fromkeys(names, "two dogs"))
    assert files.nlvr2_predictions(file("dev-1-0-0.png,true\ndev-1-1-0,False\n", "p.csv")) == expected
    as_list = [{"identifier": name, "prediction": truth} for name, truth in expected.items()]
    assert files.nlvr2_predictions(file(as_list)) == expected
    assert files.nlvr2_predictions(file("\n".join(map(json.dumps, as_list)))) == expected


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (files.caption_references, "{", r"f.json: not JSON \("),
        (files.caption_references, {"images": []}, "expected 'annotations', a list; found images"),
        (files.caption_references, [], "holds no captions"),
        (files.caption_references, {**COCO, "annotations": COCO["annotations"][:1]}, "1 images without caption"),
        (files.caption_references, KARPATHY, "--split: expected one of restval, test, found nothing"),
        (
            files.caption_references,
            [{"image": "a.jpg", "caption": [3]}],
            "entry 0: expected 'caption', a string, found 3",
        ),
        *[
            (read, {"images": [{"split": "restval", "cocoid": 1, "sentences": found}]}, "'sentences', a list of obj")
            for read in (
                partial(files.caption_references, split="restval"),
                partial(files.retrieval_texts, split="restval"),
            )
            for found in (5, None, ["a dog"])
        ],
        (
            partial(files.caption_references, split="test"),
            {"images": [row | {"cocoid": 9} for row in KARPATHY["images"]]},
            "entry 2: 9 is there twice",
        ),
        *[
            (partial(read, split="test"), content, "--split: .*f.json has no splits")
            for read in (files.caption_references, files.retrieval_texts)
            for content in (COCO, LISTS)
        ],
        (
            files.vqa_annotations,
            [{"question_id": 1, "answers": [{"answer": "x", "answer_id": [1]}]}],
            r"id.*found \[1\]",
        ),
        (files.vqa_annotations, [{"question_id": 1, "answers": []}], "entry 0: expected 'answers'"),
        (files.caption_results, {"a": 1}, "expected a list, found dict"),
        (files.caption_results, [{"image_id": 1}], "entry 0: expected 'caption', found image_id"),
        (files.caption_results, [{"image_id": 1.5, "caption": "x"}], "an integer or a string, found 1.5"),
        (
            files.caption_results,
            [{"image_id": 1, "caption": "x"}, {"image_id": "1", "caption": "y"}],
            "1 is there twice",
        ),
        (files.vqa_annotations, {"questions": []}, "expected 'annotations', a list; found questions"),
        (files.vqa_annotations, {"annotations": [{"question_id": 1}]}, "entry 0: expected 'answers'"),
        (files.vqa_annotations, {"annotations": [{"question_id": 1, "answers": [{}]}]}, "expected 'answer', a string"),
        (files.nlvr2_labels, '{"identifier": "a", "label": "yes"}', "line 1: expected True or False, found 'yes'"),
        (files.nlvr2_labels, "[1]", "entry 0: expected an object, found int"),
        (files.nlvr2_predictions, "dev-1-0-0", "line 1: expected identifier,prediction"),
        (files.nlvr2_predictions, "a,True\na,False", "line 2: 'a' is there twice"),
        (files.retrieval_texts, [], "holds no images"),
        (files.retrieval_texts, [{"image": "a", "caption": []}], "image 'a' has no text"),
    ],
)
def test_broken_files_are_named(file, read, content, message):
    with pytest.raises(UserError, match=message):
        read(file(content))
