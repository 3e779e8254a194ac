import io
import os
import pathlib
import tarfile

import numpy as np
import pytest

from vlm.data import tar_index
from vlm.data.tar_index import read_index
from vlm.errors import UserError


def write_tar(path, members, format=tarfile.GNU_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=format) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def contents(path):
    index = read_index(path)
    data = pathlib.Path(path).read_bytes()
    return {
        index.key(i): {field: data[offset : offset + size] for field, offset, size in index.members(i)}
        for i in range(len(index))
    }


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_groups_by_name_up_to_the_first_dot(tmp_path, format):
    long = "d" * 90 + "/" + "n" * (300 if format != tarfile.USTAR_FORMAT else 50)
    members = [
        ("./a/1.JPG", b"x"),
        ("a/1.seg.png", b"yy"),
        ("b/1.jpg", b""),
        (f"{long}.txt", b"z" * 600),
        ("a/1.txt", b"t"),
    ]
    path = write_tar(tmp_path / "s.tar", members, format)
    assert contents(path) == {
        "a/1": {"jpg": b"x", "seg.png": b"yy", "txt": b"t"},  # its members need not be neighbours
        "b/1": {"jpg": b""},
        long: {"txt": b"z" * 600},
    }


def test_unicode_names(tmp_path):
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert list(contents(write_tar(tmp_path / "s.tar", [("猫.txt", b"1")], format))) == ["猫"]


def test_agrees_with_tarfile_on_real_shards(shared_data):
    for path in (shared_data / "nlvr/nlvr_dev_perm0.tar", shared_data / "wds/compressed.tar"):
        with tarfile.open(path) as tar:
            expected = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        assert {f"{k}.{f}": v for k, fields in contents(str(path)).items() for f, v in fields.items()} == expected


def test_cache_is_used_and_renewed_when_the_shard_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("1.txt", b"a")])
    cache = str(tmp_path / "cache")
    first = read_index(path, cache)
    builds = []
    original = tar_index._build
    monkeypatch.setattr(tar_index, "_build", lambda p: builds.append(p) or original(p))
    second = read_index(path, cache)
    assert not builds and second.fields == first.fields and np.array_equal(second.offsets, first.offsets)
    assert second.key(0) == "1"
    write_tar(path, [("1.txt", b"a"), ("2.txt", b"b")])
    assert len(read_index(path, cache)) == 2 and builds
    (entry,) = os.listdir(cache)
    with open(os.path.join(cache, entry), "r+b") as file:
        file.truncate(100)  # a damaged cache entry is made again
    assert len(read_index(path, cache)) == 2 and len(builds) == 2


def special(kind, name="1.jpg"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return [(info, b"")]


@pytest.mark.parametrize(
    "members, message",
    [
        ([("../1.jpg", b"x")], "member name '../1.jpg' leaves the archive"),
        ([("/abs/1.jpg", b"x")], "member name '/abs/1.jpg' leaves the archive"),
        ([("a/../../1.jpg", b"x")], "leaves the archive"),
        (special(tarfile.SYMTYPE), "member '1.jpg' is a symbolic link"),
        (special(tarfile.LNKTYPE), "member '1.jpg' is a hard link"),
        (special(tarfile.FIFOTYPE), "member '1.jpg' is a FIFO"),
        (special(tarfile.CHRTYPE), "member '1.jpg' is a device"),
        ([("1.jpg", b"x"), ("1.jpg", b"y")], "member '1.jpg' appears twice"),
        ([("1.jpg", b"x"), ("1.JPG", b"y")], "member '1.JPG' appears twice"),
        ([(".hidden", b"x")], "has no example name before its first dot"),
        (special(tarfile.DIRTYPE, "folder"), "empty shard"),
        ([], "empty shard"),
    ],
)
def test_hostile_members_are_refused(tmp_path, members, message):
    path = write_tar(tmp_path / "s.tar", members)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        read_index(path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("mode, kind", [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_archives_are_named(tmp_path, mode, kind):
    path = write_tar(tmp_path / "s.tar", [("1.txt", b"x")], mode=mode)
    with pytest.raises(UserError, match=f"{kind}-compressed"):
        read_index(path)


def test_truncation_is_found_wherever_it_falls(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{i}.txt", b"x" * 700) for i in range(5)])
    whole = pathlib.Path(path).read_bytes()
    for size in range(1, 5 * 1536 + 1, 97):
        (tmp_path / "t.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated|not a tar header"):
            read_index(str(tmp_path / "t.tar"))
    (tmp_path / "t.tar").write_bytes(whole[: 2 * 1536])  # between members: only the missing end block tells
    with pytest.raises(UserError, match="truncated: 3,072 bytes end after 2 members"):
        read_index(str(tmp_path / "t.tar"))
    (tmp_path / "t.tar").write_bytes(whole[:2000])
    with pytest.raises(UserError, match="truncated|member '1.txt'"):
        read_index(str(tmp_path / "t.tar"))


def test_garbled_headers_and_glued_archives(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, [("1.txt", b"x"), ("2.txt", b"y")])
    whole = bytearray(path.read_bytes())
    for offset in (1024, 1024 + 130, 1024 + 150):  # name, size and checksum of the second header
        broken = bytearray(whole)
        broken[offset] ^= 1
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a tar header at byte 1,024"):
            read_index(str(path))
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="glued together"):
        read_index(str(path))
    path.write_bytes(os.urandom(5000))
    with pytest.raises(UserError, match="not a tar header at byte 0"):
        read_index(str(path))


def header(name=b"1.txt", size=b"00000000001\0", kind=b"0"):
    block = bytearray(
        name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"0" * 11 + b"\0" + b" " * 8 + kind
    )
    block = block.ljust(512, b"\0")
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "blocks, message",
    [
        (header(size=b"\x80" + b"\xff" * 11), "truncated: member '1.txt' needs"),
        (header(kind=b"x", size=b"77777777777\0"), "header record of 8,589,934,591 bytes"),
        (header(kind=b"x", size=b"00000000020\0") + b"99 path=aaaaaaaa\n".ljust(512, b"\0"), "garbled pax header"),
        (header(kind=b"x", size=b"00000000014\0") + b"12 size=-50\n".ljust(512, b"\0"), "garbled pax header"),
        (header(kind=b"S"), "sparse file"),
    ],
)
def test_hostile_headers(tmp_path, blocks, message):
    path = tmp_path / "s.tar"
    path.write_bytes(blocks + bytes(2048))
    with pytest.raises(UserError, match=message):
        read_index(str(path))


def test_member_count_is_capped(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "_MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="more than 3 members"):
        read_index(write_tar(tmp_path / "s.tar", [(f"{i}.txt", b"x") for i in range(4)]))
