import json
import pickle

import pytest

from vlm.data.jsonl import JsonlSource
from vlm.errors import UserError


def write(path, *lines, end="\n"):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)
    return str(path)


def test_images_and_captions(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.jpg").write_bytes(b"A")
    path = write(tmp_path / "d.jsonl", {"image": "img/a.jpg", "captions": ["x", "y"], "id": 3}, {"image": "img/a.jpg"})
    source = JsonlSource(path)
    assert source[0] == {"key": "d.jsonl:1", "image": b"A", "captions": ["x", "y"], "text": ["x", "y"], "id": 3}
    mapped = JsonlSource(path, fields={"image": "image", "text": "captions", "key": "id"})
    assert mapped[0] == {"key": "3", "image": b"A", "text": ["x", "y"]}
    with pytest.raises(UserError, match=f"^{path}: line 2: field 'text' needs 'captions', found image"):
        mapped[1]


def test_parallel_text_needs_no_image(tmp_path):
    rows = [{"source_text": f"en {i}", "text": f"中 {i}", "language": "zh"} for i in range(50)]
    source = pickle.loads(pickle.dumps(JsonlSource(write(tmp_path / "p.jsonl", *rows))))
    assert [{k: v for k, v in source[i].items() if k != "key"} for i in range(50)] == rows


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n  \n"])
def test_blank_lines_bom_and_line_ends(tmp_path, end):
    path = write(tmp_path / "p.jsonl", '\ufeff{"text": "a"}', "", " ", "\r", '{"text": "b\u2028c"}', end=end)
    source = JsonlSource(path)
    assert [source[i]["text"] for i in range(len(source))] == ["a", "b\u2028c"]
    assert source[1]["key"] == "p.jsonl:5"  # line numbers count blank lines, as editors do


def test_several_files(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", *({"text": f"{name}{i}"} for i in range(3)))
    source = JsonlSource(f"{tmp_path}/{{a,b}}.jsonl")
    assert [source[i]["text"] for i in range(6)] == ["a0", "a1", "a2", "b0", "b1", "b2"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": "b', "line 2: not JSON .* \\(truncated\\?"),
        ('{"text": "a"}\n{"text": "b"}\n' + "\0" * 40, "line 3: not JSON .* \\(truncated\\?"),
        ('[{"text": "a"}]', "line 1: expected a JSON object, found list \\(wrong format\\?"),
        ("text\timage\n", "line 1: not JSON"),
        ("\n\n", "empty shard"),
    ],
)
def test_wrong_files_stop_at_start(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/p.jsonl: {message}"):
        JsonlSource(str(tmp_path / "p.jsonl"))


def test_gzip_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\x1f\x8b" + bytes(50))
    with pytest.raises(UserError, match="gzip-compressed"):
        JsonlSource(str(tmp_path / "p.jsonl"))


def test_garbled_lines_inside_concern_their_record_only(tmp_path):
    source = JsonlSource(write(tmp_path / "p.jsonl", {"text": "a"}, "{{", "[" * 200_000, "3", {"text": "b"}))
    assert source[0]["text"] == "a" and source[4]["text"] == "b"
    for index, message in ((1, "not JSON"), (2, "JSON nested too deeply"), (3, "expected a JSON object, found int")):
        with pytest.raises(UserError, match=f"line {index + 1}: {message}"):
            source[index]


def test_image_outside_is_one_record_s_error(tmp_path):
    source = JsonlSource(write(tmp_path / "p.jsonl", {"image": "../x.jpg"}, {"text": "b"}))
    with pytest.raises(UserError, match="line 1: image '../x.jpg' leaves"):
        source[0]
    assert source[1]["text"] == "b"


def test_real_file(shared_data):
    source = JsonlSource(
        str(shared_data / "captions/coco2014_val_80_captions_boxes.jsonl"),
        fields={"text": "captions", "key": "id", "box": "instances/bbox"},
    )
    assert len(source) == 80 and source[0]["key"] == "000000296284"
    assert len(source[0]["text"]) == 5 and len(source[0]["box"][0]) == 4


def test_nlvr2_lines_name_their_pair(tmp_path, shared_data):
    real = (shared_data / "nlvr2" / "dev.json").read_text().splitlines()[:2]
    first = json.loads(real[0])
    train = {"identifier": "train-10-2-0", "directory": 59, "sentence": "Two dogs.", "label": "True"}
    (tmp_path / "dev.json").write_text("\n".join([*real, json.dumps(train)]) + "\n")
    images = {f"dev/{first['identifier'].rpartition('-')[0]}-img{side}.png": f"dev {side}" for side in (0, 1)}
    images |= {f"train/59/train-10-2-img{side}.png": f"train {side}" for side in (0, 1)}
    for name, content in images.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    source = JsonlSource(str(tmp_path / "dev.json"), root=str(tmp_path / "images"))
    for index, part, row in ((0, b"dev", first), (2, b"train", train)):
        example = source[index]
        assert example["image"] == [part + b" 0", part + b" 1"] and example["text"] == row["sentence"]
        assert example["label"] == row["label"] and example["identifier"] == row["identifier"]
    with pytest.raises(UserError, match=r"dev-\d+-\d+-img0\.png"):
        JsonlSource(str(tmp_path / "dev.json"))[0]
    own = {"identifier": "dev-1-0-0", "sentence": "a", "images": ["dev.json"]}
    (tmp_path / "own.json").write_text(json.dumps(own) + "\n")
    assert "image" not in JsonlSource(str(tmp_path / "own.json"))[0]
