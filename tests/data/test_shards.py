import os

import pytest

from vlm.data.shards import Starts, expand
from vlm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("00.tar", "01.tar", "02.tar", "x-00000-of-00002.tar", "x-00001-of-00002.tar"):
        (tmp_path / name).write_bytes(b"1")
    return tmp_path


def names(files):
    return [os.path.basename(name) for name in files]


def test_patterns(folder):
    assert names(expand(f"{folder}/0*.tar")) == ["00.tar", "01.tar", "02.tar"]
    assert names(expand(f"{folder}/{{00..02}}.tar")) == ["00.tar", "01.tar", "02.tar"]
    assert names(expand(f"{folder}/{{02,00}}.tar")) == ["02.tar", "00.tar"]
    assert names(expand([f"{folder}/01.tar", f"{folder}/x-*"])) == ["01.tar", *names(expand(f"{folder}/x-*"))]
    (folder / "a{1..2}.tar").write_bytes(b"1")
    assert names(expand(f"{folder}/a{{1..2}}.tar")) == ["a{1..2}.tar"]  # a file of that very name


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{00..03}.tar", r"^missing shard: .*/03\.tar$"),
        ("*.jpg", r"^no file matches: "),
        ("{05..01}.tar", "is empty or too long"),
        ("{0..99999999999}.tar", "is empty or too long"),
        ("", "is a folder; give a file or a pattern"),
        ("{00,00}.tar", "listed twice"),
    ],
)
def test_wrong_patterns(folder, pattern, message):
    with pytest.raises(UserError, match=message):
        expand(f"{folder}/{pattern}")


def test_lost_and_empty_shards(folder):
    with pytest.raises(UserError, match="expected 4 shards, found 3"):
        expand(f"{folder}/0*.tar", num_shards=4)
    (folder / "x-00000-of-00002.tar").unlink()
    with pytest.raises(UserError, match="missing shard .*/x-00000-of-00002.tar: expected 2 shards, found 1"):
        expand(f"{folder}/x-*")
    (folder / "01.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"01\.tar: empty shard \(0 bytes\)"):
        expand(f"{folder}/0*.tar")
    os.mkfifo(folder / "03.tar")
    with pytest.raises(UserError, match="not a regular file"):
        expand(f"{folder}/03.tar")
    with pytest.raises(UserError, match="no data path"):
        expand([])


def test_starts_locate_every_record():
    starts = Starts([2, 0, 3])
    assert [starts.locate(i) for i in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            starts.locate(index)
