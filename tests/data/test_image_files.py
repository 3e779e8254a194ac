import os

import pytest

from vlm.data.image_files import ImageFiles
from vlm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "1.jpg").write_bytes(b"inside")
    (tmp_path / "outside.jpg").write_bytes(b"outside")
    os.symlink(tmp_path / "outside.jpg", tmp_path / "data" / "link.jpg")
    os.symlink(tmp_path / "data" / "images" / "1.jpg", tmp_path / "data" / "good.jpg")
    os.symlink("loop.jpg", tmp_path / "data" / "loop.jpg")
    return tmp_path


def test_reads_relative_to_its_folder(folder):
    images = ImageFiles(None, str(folder / "data"), 100)
    assert images.read("images/1.jpg", "") == b"inside"
    assert images.read(["./images/1.jpg", b"raw"], "") == [b"inside", b"raw"]
    assert images.read("good.jpg", "") == b"inside"


@pytest.mark.parametrize(
    "value, message",
    [
        ("../outside.jpg", "leaves the data's folder"),
        ("images/../../outside.jpg", "leaves the data's folder"),
        ("/etc/passwd", "leaves the data's folder"),
        ("link.jpg", "lies outside"),
        ("images/2.jpg", "image 'images/2.jpg': no such file"),
        ("images/1.jpg/x", "not a directory"),
        ("images", "not a regular file"),
        ("a\0b", "must be a path"),
        ("", "must be a path"),
        (3, "must be a path, found 3"),
        (None, "must be a path"),
        ("half a pair \ud83d", "must be a path"),
        ("a caption in the place of a name " * 9, "file name too long"),
        ("loop.jpg", "too many levels of symbolic links"),
    ],
)
def test_without_root_nothing_outside_is_read(folder, value, message):
    with pytest.raises(UserError, match=f"^line 7: .*{message}"):
        ImageFiles(None, str(folder / "data"), 100).read(value, "line 7")


def test_a_chosen_root_takes_absolute_paths_and_links_inside_it(folder):
    images = ImageFiles(str(folder / "data"), "elsewhere", 100)
    assert images.read(str(folder / "data/images/1.jpg"), "") == b"inside"
    assert images.read("images/../images/1.jpg", "") == b"inside"
    assert images.read("link.jpg", "") == b"outside"
    for value in ("../outside.jpg", str(folder / "outside.jpg"), f"{folder}/data2/1.jpg"):
        with pytest.raises(UserError, match="lies outside"):
            images.read(value, "")
    with pytest.raises(UserError, match="^root: no such folder"):
        ImageFiles(str(folder / "nowhere"), "", 100)


def test_size_limits_and_special_files(folder):
    images = ImageFiles(None, str(folder / "data"), 5)
    with pytest.raises(UserError, match="has 6 bytes \\(limit 5\\)"):
        images.read("images/1.jpg", "")
    (folder / "data/0.jpg").write_bytes(b"")
    os.mkfifo(folder / "data/pipe.jpg")  # opening it for reading would hang
    for name in ("0.jpg", "pipe.jpg"):
        with pytest.raises(UserError, match="has 0 bytes|not a regular file"):
            images.read(name, "")
