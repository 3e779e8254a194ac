"""Members are found exactly; whatever is compressed, doubled, oversized or cut off is refused."""

import io
import zipfile

import numpy as np
import pytest

from vlm.convert import zip_file
from vlm.errors import UserError


def archive(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as file:
        for name, data in members:
            file.writestr(name, data)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def members(data):
    return zip_file.stored_members("x.pt", data)


def test_members_are_where_zipfile_finds_them():
    content = [("a/data.pkl", b"hello"), ("a/data/0", bytes(range(200))), ("a/é", b"")]
    data = archive(content)
    found = members(data)
    assert {name: bytes(data[at : at + size]) for name, (at, size) in found.items()} == dict(content)


def test_zip64_fields():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, file.open("a", "w", force_zip64=True) as member:
        member.write(b"x" * 10)
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    at, size = members(data)["a"]
    assert bytes(data[at : at + size]) == b"x" * 10


def test_compressed_and_doubled_members_are_refused():
    with pytest.raises(UserError, match="'a' is compressed or encrypted"):
        members(archive([("a", b"x" * 1000)], compression=zipfile.ZIP_DEFLATED))
    assert members(archive([("a/code/m.py", b"x" * 1000)], compression=zipfile.ZIP_DEFLATED)) == {}
    with pytest.warns(UserWarning, match="Duplicate name"):
        doubled = archive([("a", b"1"), ("a", b"2")])
    with pytest.raises(UserError, match="'a' appears twice"):
        members(doubled)


def test_too_many_members(monkeypatch):
    monkeypatch.setattr(zip_file, "MAX_MEMBERS", 3)
    with pytest.raises(UserError, match="4 members, at most 3"):
        members(archive([(str(i), b"") for i in range(4)]))


def test_every_truncation_is_an_error():
    data = archive([("a", b"hello"), ("b", b"world" * 20)])
    for end in range(len(data)):
        with pytest.raises(UserError):
            members(data[:end])


def test_bit_flips_give_members_inside_the_file_or_an_error():
    data = archive([("a", b"hello"), ("b", b"world" * 20)])
    for bit in range(len(data) * 8):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = members(flipped)
        except UserError:
            continue
        assert all(at >= 0 and at + size <= len(data) for at, size in found.values())
