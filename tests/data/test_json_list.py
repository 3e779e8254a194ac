"""Lists of records and the published annotation forms as sources, end to end with their image files."""

import json
import pickle

import pytest

from vlm.data.json_list import JsonSource
from vlm.data.source import open_source, open_sources
from vlm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "c é.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(folder, content, name="d.json", **options):
    text = content if isinstance(content, str) else json.dumps(content, **options)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def all_of(source):
    return [source[index] for index in range(len(source))]


TRAIN = [
    {"image": "b.jpg", "caption": "two", "image_id": "coco_2"},
    {"image": "a.jpg", "caption": "one", "image_id": "coco_1"},
    {"image": "c é.jpg", "caption": "drei – ü", "image_id": "ü"},
    {"image": "b.jpg", "caption": "zwei", "image_id": "coco_2"},
]


@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}, {"indent": 2, "ensure_ascii": False}])
def test_training_captions(folder, options):
    source = open_source({"kind": "json", "path": write(folder, TRAIN, **options), "number": "image_id"})
    source = pickle.loads(pickle.dumps(source))
    rows = all_of(source)
    assert [row["text"] for row in rows] == ["two", "one", "drei – ü", "zwei"]
    assert [row["image"] for row in rows] == [row["image"].encode() for row in TRAIN]
    assert [row["image_number"] for row in rows] == [0, 1, 2, 0]
    assert rows[3]["key"] == "d.json:4" and rows[3]["image_id"] == "coco_2"
    assert [row["image_file"] for row in rows] == [row["image"] for row in TRAIN]


def test_image_numbers_go_on_over_files(folder):
    write(folder, TRAIN[:2], "1.json")
    write(folder, TRAIN[1:], "2.json")
    source = JsonSource([f"{folder}/1.json", f"{folder}/2.json"], number="image_id", fields={"text": "caption"})
    assert [row["image_number"] for row in all_of(source)] == [0, 1, 1, 2, 0]
    assert set(source[0]) == {"key", "text", "image_number"}


def test_numbers_of_several_sources_would_coincide(folder):
    spec = {"kind": "json", "path": write(folder, TRAIN), "number": "image_id"}
    assert len(open_sources([spec])[0]) == 1
    with pytest.raises(UserError, match="`number` counts from 0 in each of them.*expected one source"):
        open_sources([spec, {"kind": "json", "path": spec["path"]}])


def test_several_captions_stay_together_or_become_examples(folder):
    path = write(folder, [{"image": "a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": ["z"]}])
    assert [row["text"] for row in all_of(JsonSource(path))] == [["x", "y"], ["z"]]
    each = all_of(JsonSource(path, each="caption"))
    assert [(row["key"], row["text"], row["image"]) for row in each] == [
        ("d.json:1.0", "x", b"a.jpg"),
        ("d.json:1.1", "y", b"a.jpg"),
        ("d.json:2.0", "z", b"b.jpg"),
    ]


def test_questions_as_blip_ships_them(folder):
    vqa = {"question_id": 7, "question": "Who?", "answer": ["me"] * 10, "image": "a.jpg", "dataset": "vqa"}
    vg = {"image": "b.jpg", "question": "What?", "answer": "a cat", "dataset": "vg"}
    rows = all_of(JsonSource(write(folder, [vqa, vg])))
    assert rows[0] == vqa | {"image": b"a.jpg", "image_file": "a.jpg", "key": "d.json:1"}
    assert rows[1]["answer"] == "a cat"


def test_image_pairs(folder):
    path = write(folder, [{"sentence": "both", "label": "True", "images": ["a.jpg", "b.jpg"]}])
    assert JsonSource(path)[0]["image"] == [b"a.jpg", b"b.jpg"]
    mapped = JsonSource(path, fields={"image": "images", "text": "sentence", "label": "label"})[0]
    assert mapped == {"key": "d.json:1", "image": [b"a.jpg", b"b.jpg"], "text": "both", "label": "True"}


def test_videos_as_folders_of_frames(folder):
    (folder / "frames/v1").mkdir(parents=True)
    for number in range(12):
        (folder / f"frames/v1/{number}.jpg").write_bytes(b"%d" % number)
    (folder / "m.jsonl").write_text('{"clip_name": "v1", "caption": "t"}\n{"clip_name": "../..", "caption": "t"}\n')
    fields = {"image": "frames/{clip_name}", "text": "caption"}
    source = open_source({"kind": "jsonl", "path": str(folder / "m.jsonl"), "fields": fields, "frames": 8})
    assert source[0]["image"] == [b"%d" % int(i * 12 / 8) for i in range(8)]
    with pytest.raises(UserError, match="line 2: image 'frames/../..' leaves"):
        source[1]


KARPATHY = {
    "images": [
        {
            "filepath": ".",
            "filename": "a.jpg",
            "split": "train",
            "cocoid": 11,
            "imgid": 0,
            "sentences": [{"raw": "A."}],
        },
        {"filename": "b.jpg", "split": "restval", "imgid": 1, "sentences": [{"raw": "B"}, {"raw": "B2 ü"}]},
        {"filename": "a.jpg", "split": "test", "imgid": 2, "sentences": []},
    ],
    "dataset": "coco",
}


def test_karpathys_original(folder):
    path = write(folder, KARPATHY)
    source = open_source({"kind": "json", "path": path, "where": {"split": ("train", "restval")}, "each": "caption"})
    assert [(row["image"], row["text"], row["image_id"]) for row in all_of(source)] == [
        (b"a.jpg", "A.", 11),
        (b"b.jpg", "B", 1),
        (b"b.jpg", "B2 ü", 1),
    ]
    assert len(JsonSource(path, where={"split": "test"})) == 1
    with pytest.raises(UserError, match=r"empty shard \(3 records, none with"):
        JsonSource(path, where={"split": "val"})


def test_coco_captions_and_nocaps_images(folder):
    content = {
        "info": {"year": 2014, "nested": {"list": [1, [2]]}},
        "licenses": [],
        "images": [{"id": 5, "file_name": "a.jpg", "domain": "in-domain"}, {"id": 4, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "four"},
            {"id": 2, "image_id": 5, "caption": "five"},
            {"id": 3, "image_id": 4, "caption": "vier"},
        ],
    }
    rows = all_of(JsonSource(write(folder, content)))
    assert [(row["image"], row["text"], row["image_id"]) for row in rows] == [
        (b"a.jpg", ["five"], 5),
        (b"b.jpg", ["four", "vier"], 4),
    ]
    assert rows[0]["domain"] == "in-domain"
    row = JsonSource(write(folder, {"images": content["images"], "annotations": []}))[1]
    assert "text" not in row and row["image_id"] == 4
    row = JsonSource(write(folder, {"images": [{"id": 4}], "annotations": content["annotations"][:1]}))[0]
    assert row["text"] == ["four"] and "image" not in row


QUESTIONS = {
    "data_subtype": "test-dev2015",
    "questions": [
        {"question_id": 2, "image_id": 9, "question": "Ü?"},
        {"question_id": 1, "image_id": 9, "question": "how?"},
    ],
}


def answers(*identities):
    return {
        "annotations": [
            {"question_id": i, "answer_type": "other", "answers": [{"answer": f"a{i}", "answer_id": 1}] * 10}
            for i in identities
        ]
    }


def test_vqa_questions_and_answers(folder):
    (folder / "test2015").mkdir()
    (folder / "test2015/COCO_test2015_000000000009.jpg").write_bytes(b"9")
    path, answer_path = write(folder, QUESTIONS), write(folder, answers(1, 2), "answers.json")
    rows = all_of(open_source({"kind": "json", "path": path, "annotations": answer_path}))
    assert [(row["question_id"], row["question"], row["answer"]) for row in rows] == [
        (2, "Ü?", ["a2"] * 10),
        (1, "how?", ["a1"] * 10),
    ]
    assert rows[0]["image"] == b"9" and rows[0]["answer_type"] == "other"
    assert "answer" not in JsonSource(path)[0] and "answers" not in rows[0]
    records = [{"answer": "x", "answer_confidence": "yes"}] * 2
    write(folder, {"annotations": [{"question_id": i, "answers": records} for i in (1, 2)]}, "answers.json")
    row = JsonSource(path, annotations=answer_path)[0]
    assert row["answer"] == ["x", "x"] and row["answers"] == records
    for identities, message in (
        ((2,), "questions record 2: question_id 1 has no answers"),
        ((1, 2, 3), "answers.json: question_id 3 is not among the questions"),
        ((1, 1), "annotations record 2: question_id 1 stands twice"),
    ):
        write(folder, answers(*identities), "answers.json")
        with pytest.raises(UserError, match=message):
            JsonSource(path, annotations=answer_path)


def test_textvqa_files(shared_data):
    source = JsonSource(
        str(shared_data / "vqa/textvqa_val_questions_vqa_format.json"),
        annotations=str(shared_data / "vqa/textvqa_val_annotations_vqa_format.json"),
        fields={"question": "question", "answer": "answer", "path": "{image_id}.jpg"},
    )
    assert len(source) == 5000
    row = source[0]
    assert row["question"] == "what is the brand of this camera?" and len(row["answer"]) == 10
    assert row["path"] == "003a8ae2ef43b901.jpg"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "empty shard"),
        ("[]", {}, "empty shard"),
        ("text", {}, "not JSON"),
        ('[{"a": 1}, {"a": 2', {}, "record 2: not JSON .*truncated"),
        ('[{"a": 1}, {"a": 2}', {}, "record 2: not JSON .*expected , or ]"),
        ('[{"a": 1}] x', {}, "more at character 11"),
        ('{"images": [{"id": 1}], "annotations": [', {}, "annotations record 1: not JSON"),
        ('{"images": [{"id": 1}]', {}, "expected , or }"),
        ('["yes", "no"]', {}, "record 1: expected a JSON object, found str"),
        ("[" * 100_000, {}, "nested too deeply"),
        ({"data": [{"id": 1}], "x": 1}, {}, "expected a list of records, COCO captions.*, found data, x"),
        ({"images": [{"id": 1}, {"id": 1}]}, {}, "images record 2: id 1 stands twice"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": ""}]}, {}, "image_id 2 is not among"),
        ({"images": [{"id": 1}], "annotations": [{"image_id": 1}]}, {}, "annotations record 1: no 'caption', found"),
        ([{"a": 1}], {"where": {"split": "x"}}, "record 1: where: no field 'split'"),
        ([{"a": 1}], {"each": "a"}, "record 1: each: field 'a' must be a list, found 1"),
        ([{"a": 1}, {"b": 1}], {"number": "a"}, "record 2: number: field 'a' must be a name or number, found None"),
        ([{"a": 1}], {"annotations": "d.json"}, "`annotations` belong to a file of VQA questions"),
    ],
)
def test_wrong_files_stop_at_start(folder, monkeypatch, content, options, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=f"^d.json: .*{message}"):
        JsonSource(str(write(folder, content)) and "d.json", **options)


def test_a_bad_record_concerns_only_itself(folder):
    bad = [{"image": "a.jpg"}, 3, {"image": "../x.jpg"}, {"image": "gone.jpg"}, {"image": 7}, {"image": "b.jpg"}]
    source = JsonSource(write(folder, bad), fields={"image": "image"})
    assert source[0]["image"] == b"a.jpg" and source[5]["image"] == b"b.jpg"
    for index, message in (
        (1, "expected a JSON object, found int"),
        (2, "image '../x.jpg' leaves the data's folder"),
        (3, "image 'gone.jpg': no such file"),
        (4, "image must be a path, found 7"),
    ):
        with pytest.raises(UserError, match=f"d.json: record {index + 1}: {message}"):
            source[index]
    with pytest.raises(UserError, match="record 1: field 'text' needs 'caption', found image"):
        JsonSource(write(folder, bad), fields={"text": "caption"})[0]


def test_the_fingerprint_follows_what_is_read(folder):
    path = write(
        folder, [{"image": "a.jpg", "caption": ["x"], "split": 1}, {"image": "b.jpg", "caption": [], "split": 1}]
    )
    prints = [
        JsonSource(path, **options).fingerprint
        for options in (
            {},
            {},
            {"each": "caption"},
            {"where": {"split": 1}},
            {"number": "image"},
            {"fields": {"t": "x"}},
        )
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 5
