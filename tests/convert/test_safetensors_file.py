"""Values as the library reads them, without copying; hostile headers are refused."""

import contextlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vlm.convert.safetensors_file import open_safetensors
from vlm.errors import UserError


def test_values_and_slices(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype("f4"),
        "b": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float16),
        "ints": np.arange(6, dtype=np.int64).reshape(2, 3),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 3), "f4"),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    views = open_safetensors(tmp_path / "x.safetensors")
    assert views.keys() == arrays.keys()
    for name, array in arrays.items():
        assert views[name].shape == array.shape and views[name].dtype == array.dtype
        np.testing.assert_array_equal(views[name].read(), array)
    np.testing.assert_array_equal(views["a"].read((slice(1, 3), slice(0, 2))), arrays["a"][1:3, :2])
    assert not views["a"].read().flags.owndata


def craft(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "huge header": craft({}, length=2**62),
    "100 MB header": craft(b" " * 101_000_000),
    "header beyond the file": craft({}, length=1000),
    "not JSON": craft(b"{nonsense"),
    "list": craft([]),
    "deep": craft(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "overlap": craft({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "hole": craft({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "trailing": craft({"a": entry([1], 0, 4)}, bytes(8)),
    "truncated data": craft({"a": entry([4], 0, 16)}, bytes(8)),
    "wrong size": craft({"a": entry([3], 0, 16)}, bytes(16)),
    "overflow": craft({"a": entry([2**62, 4], 0, 0)}),
    "huge empty shape": craft({"a": entry([2**62, 0], 0, 0)}),
    "negative": craft({"a": entry([-1], 0, 4)}, bytes(4)),
    "backwards": craft({"a": entry([1], 4, 0)}, bytes(4)),
    "unknown type": craft({"a": entry([4], 0, 4, "F8_E4M3")}, bytes(4)),
    "line break in a name": craft({"a\nb": entry([1], 0, 4)}, bytes(4)),
    "duplicate": craft(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "empty file": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.safetensors") as error:
        open_safetensors(path)
    assert "\n" not in str(error.value)


def test_mutations_never_crash(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones((3, 4), "f4"), "b": np.arange(5)}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if rng.random() < 0.2 else data)
        with contextlib.suppress(UserError):
            assert sum(view.read().nbytes for view in open_safetensors(path).values()) <= len(whole)
