"""Tar shards as written: the same bytes every time, whole or absent, one writer at a time."""

import hashlib
import tarfile

import pytest

from vlm.data.tar import TarSource
from vlm.data.tar_writer import TarWriter
from vlm.errors import UserError

RECORDS = {"a/0": {"jpg": b"\xff" * 700, "txt": "ein Hündchen".encode()}, f"{'long/' * 30}1": {"txt": b""}}


def write(path):
    with TarWriter(path) as writer:
        for key, members in RECORDS.items():
            writer.add(key, members)
        return writer.finish()


def test_readers_find_what_was_written_and_bytes_repeat(tmp_path):
    size, digest = write(tmp_path / "a-00001-of-00004.tar")
    data = (tmp_path / "a-00001-of-00004.tar").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest) == write(tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar") as file:
        found = {member.name: file.extractfile(member).read() for member in file}
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in file} == {(0, 0, "", 0o644)}
    assert found == {f"{key}.{name}": data for key, members in RECORDS.items() for name, data in members.items()}
    source = TarSource.single(str(tmp_path / "a-00001-of-00004.tar"))
    assert [source[i]["key"] for i in range(2)] == list(RECORDS) and source[0]["text"] == "ein Hündchen"
    with pytest.raises(UserError, match="missing shard .*a-00000-of-00004"):
        TarSource(str(tmp_path / "a-00001-of-00004.tar"))


def test_nothing_appears_before_the_end(tmp_path):
    path = tmp_path / "a.tar"
    (tmp_path / ".a.tar.tmp").write_bytes(b"left by a killed process" * 1000)
    with TarWriter(path) as writer:
        writer.add("0", {"txt": b"0"})
        assert not path.exists()
        with pytest.raises(UserError, match=r"a\.tar: another process is writing it"):
            TarWriter(path)
    assert not list(tmp_path.iterdir())  # left without finish: nothing stays
    with TarWriter(path) as writer:
        assert writer.finish() == (0, "")
    assert not list(tmp_path.iterdir())
    write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_a_folder_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"cannot be written: No such file or directory"):
        TarWriter("/nowhere/a.tar")
