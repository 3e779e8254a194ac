"""Files that PyTorch reads, mapped or not, and that are the same for the same tensors."""

import ml_dtypes
import numpy as np
import pytest
import torch

from vlm.convert import torch_writer
from vlm.convert.torch_file import open_tensors
from vlm.convert.torch_writer import write_pth
from vlm.convert.views import TensorView, from_array, permute
from vlm.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.normal(size=(7, 5)).astype(np.float32),
    "half.weight": RNG.normal(size=(3,)).astype(ml_dtypes.bfloat16),
    "scalar": np.float32(0.07).reshape(()),
    "empty": np.zeros((0, 4), np.float32),
    "index": np.array([2**40], np.int64),
    "mask": np.array([True, False]),
    "umlaut ä": np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
}


def views():
    return {name: from_array(array) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("mapped", [False, True])
def test_pytorch_reads_it(tmp_path, mapped, monkeypatch):
    monkeypatch.setattr(torch_writer, "BLOCK_BYTES", 40)
    counts = []
    write_pth(tmp_path / "model.pth", views(), progress=counts.append)
    loaded = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mapped)["model"]
    assert loaded.keys() == ARRAYS.keys() and sum(counts) == sum(array.nbytes for array in ARRAYS.values())
    for name, array in ARRAYS.items():
        found = loaded[name]
        assert tuple(found.shape) == array.shape and not found.requires_grad
        found = found.float() if found.dtype == torch.bfloat16 else found
        np.testing.assert_array_equal(found.numpy(), array.astype(np.float32) if "half" in name else array)
        assert mapped is False or found.data_ptr() % array.itemsize == 0


def test_we_read_it_and_it_is_reproducible(tmp_path):
    write_pth(tmp_path / "a.pth", views() | {"turned": permute(views()["matrix"], (1, 0))})
    write_pth(tmp_path / "b.pth", views() | {"turned": permute(views()["matrix"], (1, 0))})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    found = open_tensors(tmp_path / "a.pth")
    np.testing.assert_array_equal(found["turned"].read(), ARRAYS["matrix"].T)
    assert all(found[name].read().tobytes() == array.tobytes() for name, array in ARRAYS.items())


def test_nothing_is_left_of_a_failed_file(tmp_path):
    def fail(index):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        write_pth(tmp_path / "model.pth", {"x": TensorView((2,), np.dtype(np.float32), fail)})
    with pytest.raises(UserError, match="x: PyTorch has no type uint32"):
        write_pth(tmp_path / "model.pth", {"x": from_array(np.zeros(2, np.uint32))})
    assert list(tmp_path.iterdir()) == []
