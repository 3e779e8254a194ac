import json

import pytest

from vlm.data.source import Subset, open_source, open_sources
from vlm.errors import UserError


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"text": str(i), "id": i}) for i in range(50)))
    return str(path)


def test_open_and_ranges(lines):
    spec = {"kind": "jsonl", "path": lines, "fields": {"text": "text"}, "split": None, "num_examples": 50}
    assert len(open_source(spec)) == 50
    halves = [open_source({"kind": "jsonl", "path": lines, "split": split}) for split in ("[:33%]", "[33%:]")]
    assert [half[i]["text"] for half in halves for i in range(len(half))] == [str(i) for i in range(50)]
    tail = open_source({"kind": "jsonl", "path": lines, "split": "[47:]"})
    assert [tail[i]["text"] for i in range(3)] == ["47", "48", "49"]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            tail[index]
    assert len({half.fingerprint for half in halves}) == 2 and isinstance(tail, Subset)


def test_config_dicts_are_taken(lines):
    from ml_collections import ConfigDict

    assert open_source(ConfigDict({"kind": "jsonl", "path": lines, "fields": {"text": "text"}}))[3]["text"] == "3"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "jsnl"}, "unknown kind 'jsnl'; did you mean 'jsonl'"),
        ({"kind": None}, "unknown kind None"),
        ({"feilds": {}}, "kind 'jsonl': unknown option 'feilds'; did you mean 'fields'"),
        ({"index_dir": "x"}, "kind 'jsonl': unknown option 'index_dir'"),
        ({"ids": "test.txt"}, "kind 'jsonl': unknown option 'ids'"),
        ({"kind": "lines", "texts": "en.txt"}, "option 'texts': expected Mapping, found 'en.txt'"),
        ({"path": 3}, "option 'path': expected str or tuple or list, found 3"),
        ({"fields": "text"}, "option 'fields': expected Mapping, found 'text'"),
        ({"num_examples": True}, "option 'num_examples': expected int, found True"),
        ({"path": ""}, "`path` is missing"),
        ({"num_examples": 51}, "expected 51 examples, found 50"),
        ({"num_shards": 2}, "expected 2 shards, found 1"),
        ({"split": "[60:]"}, "of 50 records is empty or out of range"),
        ({"split": "[10:5]"}, "of 50 records is empty or out of range"),
        ({"split": "train"}, "expected a range such as"),
        ({"fields": {"text": "tekst"}}, "line 1: field 'text' needs 'tekst', found text, id; did you mean 'text'"),
    ],
)
def test_wrong_descriptions(lines, change, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source({"kind": "jsonl", "path": lines, **change})
    assert "\n" not in str(caught.value)


def test_not_a_mapping():
    with pytest.raises(UserError, match="expected a mapping with `kind` and `path`, found 'tar:x'"):
        open_source("tar:x")


def test_a_bad_first_record_is_not_the_source_s_fault(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"image": "absent.jpg"}\n{"image": "there.jpg"}\n')
    spec = {"kind": "jsonl", "path": str(path), "fields": {"image": "image"}}
    with pytest.raises(UserError, match="line 1: image 'absent.jpg': no such file"):
        open_source(spec)
    (tmp_path / "there.jpg").write_bytes(b"x")
    assert len(open_source(spec)) == 2


def test_weights_for_all_or_none(lines):
    spec = {"kind": "jsonl", "path": lines}
    sources, weights = open_sources([{**spec, "weight": 2}, {**spec, "weight": 0.5, "split": "[:10]"}])
    assert [len(s) for s in sources] == [50, 10] and weights == [2.0, 0.5]
    assert open_sources([spec, {**spec, "split": "[:10]"}])[1] == [50.0, 10.0]
    with pytest.raises(UserError, match="`weight` for all of them or for none"):
        open_sources([spec, {**spec, "weight": 1}])
    with pytest.raises(UserError, match="no source given"):
        open_sources([])


def test_real_unreadable_data_is_refused_clearly(shared_data):
    with pytest.raises(UserError, match="file format 'tfrecord' needs TensorFlow"):
        open_source({"kind": "tfds", "path": str(shared_data / "tfds/c4/en/3.0.1"), "split": "train"})
    with pytest.raises(UserError, match="field 'text' needs 'txt', found txt.gz"):
        open_source({"kind": "tar", "path": str(shared_data / "wds/compressed.tar"), "fields": {"text": "txt"}})
