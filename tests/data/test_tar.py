import concurrent.futures
import io
import json
import pickle
import tarfile

import pytest

from vlm.data import tar as tar_module
from vlm.data.tar import TarSource
from vlm.errors import UserError


def write_shard(path, examples):
    with tarfile.open(path, "w") as tar:
        for key, fields in examples:
            for extension, data in fields.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for shard in range(3):
        examples = [
            (f"{shard}{i}", {"jpg": bytes([shard, i]), "txt": f"é {i}".encode(), "json": json.dumps({"a": i}).encode()})
            for i in range(4 + shard)
        ]
        write_shard(tmp_path / f"{shard:05d}.tar", examples)
    return tmp_path


def test_values_by_kind_over_shards(folder):
    source = TarSource(f"{folder}/{{00000..00002}}.tar")
    assert len(source) == 15
    example = source[5]
    assert (example["key"], example["image"], example["text"]) == ("11", b"\x01\x01", "é 1")
    assert example["json"] == {"a": 1} and example["jpg"] == b"\x01\x01"
    assert [source[i]["key"] for i in range(15)] == [f"{s}{i}" for s in range(3) for i in range(4 + s)]


def test_mapping_reads_only_its_members(folder, monkeypatch):
    source = TarSource(f"{folder}/*.tar", fields={"label": "json/a"})
    sizes = []
    original = source._files.read
    monkeypatch.setattr(source._files, "read", lambda *a: sizes.append(a[2]) or original(*a))
    assert source[2] == {"key": "02", "label": 2} and len(sizes) == 1


def test_pickles_and_serves_threads(folder, monkeypatch):
    monkeypatch.setattr(tar_module, "_MAX_OPEN", 1)  # every change of shard evicts a descriptor
    source = pickle.loads(pickle.dumps(TarSource(f"{folder}/*.tar", fields={"text": "txt", "image": "jpg"})))
    expected = [source[i] for i in range(15)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[i % 15], range(1500)))
    assert found == expected * 100


def test_fingerprint_follows_content_and_mapping(folder, tmp_path_factory):
    first = TarSource(f"{folder}/*.tar").fingerprint
    assert first == TarSource(f"{folder}/*.tar").fingerprint
    assert first != TarSource(f"{folder}/*.tar", fields={"text": "txt"}).fingerprint
    assert first != TarSource(f"{folder}/0000[01].tar").fingerprint


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"txt": b"\xff\xfe"}, ".txt is not UTF-8"),
        ({"json": b"{"}, ".json: not JSON"),
        ({"cls": b"cat"}, ".cls is not an integer: b'cat'"),
        ({"jpg": b"x" * 101}, "member .jpg has 101 bytes \\(limit 100\\)"),
    ],
)
def test_unreadable_examples_are_named(tmp_path, fields, message):
    path = write_shard(tmp_path / "s.tar", [("ok", {"txt": b"1"}), ("bad", fields)])
    source = TarSource(path, max_bytes=100)
    assert source[0]["text"] == "1"
    with pytest.raises(UserError, match=f"^{path}: example 'bad': {message}"):
        source[1]


def test_shard_that_shrinks_while_open(folder):
    source = TarSource(f"{folder}/00000.tar")
    with open(folder / "00000.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(UserError, match="became shorter"):
        source[3]


def test_real_shard(shared_data):
    source = TarSource(
        str(shared_data / "nlvr/nlvr_dev_perm0.tar"),
        fields={"image": "png", "text": "json/sentence", "label": "json/label"},
    )
    assert len(source) == 989
    assert all(source[i]["image"].startswith(b"\x89PNG") and len(source[i]["text"]) > 5 for i in range(0, 989, 50))
    with pytest.raises(UserError, match="gzip-compressed"):
        TarSource(str(shared_data / "wds/sample.tgz"))
    assert len(TarSource(str(shared_data / "wds/tendata.tar"))) == 100
