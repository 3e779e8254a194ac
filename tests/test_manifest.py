"""Every damage to a directory is noticed and the file is named."""

import json

import pytest

from vlm import manifest
from vlm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(64)))
    (tmp_path / "sub" / "b.bin").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    manifest.write_manifest(tmp_path, {"step": 7})
    return tmp_path


def test_intact_directory_verifies(folder):
    result = manifest.verify_manifest(folder)
    assert result["extra"] == {"step": 7}
    assert set(result["files"]) == {"a.bin", "sub/b.bin", "empty"}
    assert result["files"]["sub/b.bin"]["sha256"].startswith("2cf24dba5fb0a30e26e83b2ac5b9e29e")
    assert not list(folder.glob(".*tmp"))


def test_known_digests_are_not_recomputed(folder):
    result = manifest.write_manifest(folder, {}, digests={"a.bin": "0" * 64})
    assert result["files"]["a.bin"]["sha256"] == "0" * 64
    with pytest.raises(UserError, match=r"a\.bin: corrupted"):
        manifest.verify_manifest(folder)


@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin"])
def test_every_bit_flip_is_noticed(folder, name):
    original = (folder / name).read_bytes()
    for bit in range(len(original) * 8):
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: corrupted"):
            manifest.verify_manifest(folder)
        manifest.verify_manifest(folder, "fast")  # sizes only, as promised


def test_bit_flips_in_the_manifest_are_noticed_or_change_nothing(folder):
    path = folder / manifest.MANIFEST_NAME
    original, expected = path.read_bytes(), manifest.verify_manifest(folder)
    noticed, bits = 0, range(0, len(original) * 8, 5)
    for bit in bits:
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert manifest.verify_manifest(folder) == expected  # a changed space between two tokens
        except UserError as error:
            noticed += str(path) in str(error)
    assert noticed > 0.8 * len(bits)


def test_structural_damage_is_named(folder):
    (folder / "stray").write_bytes(b"x")
    with pytest.raises(UserError, match="stray: not listed"):
        manifest.verify_manifest(folder, "fast")
    (folder / "stray").unlink()
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"a\.bin: 5 bytes, expected 64"):
        manifest.verify_manifest(folder, "fast")
    (folder / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a\.bin: missing"):
        manifest.verify_manifest(folder, "fast")
    (folder / manifest.MANIFEST_NAME).unlink()
    with pytest.raises(UserError, match=r"vlm_manifest\.json: missing"):
        manifest.verify_manifest(folder)


def test_links_are_refused(folder):
    (folder / "link").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link: a link or special file"):
        manifest.write_manifest(folder, {})


def test_other_format_version_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 2)
    manifest.write_manifest(folder, {})
    monkeypatch.undo()
    assert json.loads((folder / manifest.MANIFEST_NAME).read_text())["format_version"] == 2
    with pytest.raises(UserError, match="format version 2, expected 1"):
        manifest.verify_manifest(folder)
