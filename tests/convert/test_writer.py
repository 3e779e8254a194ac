"""Files equal those of the safetensors library byte for byte, appear whole or not at all, in bounded memory."""

import errno
import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vlm.convert import writer
from vlm.convert.torch_file import open_tensors
from vlm.convert.views import TensorView, from_array, permute, stack
from vlm.errors import UserError

rng = np.random.default_rng(0)
ARRAYS = {
    "b": rng.normal(size=(20, 3)).astype("f4"),
    "a": np.arange(3, dtype=np.int64),
    "half": np.ones(3, np.float16),
    "flag": np.array([True, False]),
    "brain": np.ones((2, 2), ml_dtypes.bfloat16),
    "scalar": np.array(2.0),
    'odd " é': np.zeros((0, 3), "f4"),
    "ints": np.arange(3, dtype="i4"),
    "bytes": np.arange(3, dtype="u1"),
    "small": np.arange(3, dtype="i1"),
    "short": np.arange(3, dtype="i2"),
}


def lazy(arrays):
    return {name: from_array(array) for name, array in arrays.items()}


def test_equals_the_library_byte_for_byte(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "theirs", metadata={"format": "pt"})
    written = []
    digests = writer.write_tensors(tmp_path, "ours", lazy(ARRAYS), metadata={"format": "pt"}, progress=written.append)
    data = (tmp_path / "ours.safetensors").read_bytes()
    assert data == (tmp_path / "theirs").read_bytes()
    assert digests == {"ours.safetensors": hashlib.sha256(data).hexdigest()}
    assert sum(written) == len(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.safetensors", "theirs"]


def test_blocks_cover_every_shape_in_order(monkeypatch, tmp_path):
    for shape in [(), (0, 3), (7,), (5, 3), (4, 3, 5), (2, 1, 9), (1, 1)]:
        array = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
        for limit in (1, 4, 8, 12, 60, 1000):
            blocks = [array[index] for index in writer.slices(shape, 4, limit)]
            np.testing.assert_array_equal(np.concatenate([block.ravel() for block in blocks]), array.ravel())
            assert all(block.nbytes <= max(limit, 4) for block in blocks)
    monkeypatch.setattr(writer, "BLOCK_BYTES", 16)
    writer.write_tensors(tmp_path, "x", {"t": permute(stack([from_array(ARRAYS["b"])] * 3), (2, 0, 1))})
    found = open_tensors(tmp_path / "x.safetensors")["t"].read()
    np.testing.assert_array_equal(found, np.stack([ARRAYS["b"]] * 3).transpose(2, 0, 1))


def test_shards_and_their_index(tmp_path):
    digests = writer.write_tensors(tmp_path, "model", lazy(ARRAYS), max_shard_bytes=100)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(digests) and "model.safetensors.index.json" in names and len(names) > 2
    for name, digest in digests.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    found = open_tensors(tmp_path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].read(), array)


def failing(error):
    def fetch(index):
        raise error

    return TensorView((4,), np.dtype(np.float32), fetch)


def test_a_failure_leaves_nothing(tmp_path):
    for error in (UserError("source broke"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            writer.write_tensors(tmp_path, "x", {"a": from_array(ARRAYS["b"]), "b": failing(error)})
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="c: safetensors has no type for complex64"):
        writer.write_tensors(tmp_path, "x", {"c": from_array(np.zeros(2, np.complex64))})


@pytest.mark.parametrize("function", ["posix_fallocate", "fsync"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, function):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(UserError, match=r"x\.safetensors: disk full: \d+ bytes are needed"):
        writer.write_tensors(tmp_path, "x", lazy(ARRAYS))
    assert list(tmp_path.iterdir()) == []


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(RuntimeError), writer.new_folder(target) as folder:
        (folder / "x").write_text("half")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    target.mkdir()  # an empty folder is fine
    with writer.new_folder(target) as folder:
        (folder / "x").write_text("whole")
    assert (target / "x").read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["target"]
    with pytest.raises(UserError, match="exists already"), writer.new_folder(target):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists already"):
        writer.check_new_folder(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        writer.check_new_folder(tmp_path / "link")
    with pytest.raises(UserError, match="no such folder"):
        writer.check_new_folder(tmp_path / "absent" / "target")
