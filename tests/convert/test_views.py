"""Every lazy view equals the eager NumPy expression on every slice, and reads no more than it needs."""

import numpy as np
import pytest

from vlm.convert import views
from vlm.convert.views import TensorView, from_array


def spy(array):
    """A view that records the number of elements it was asked for."""
    reads = []

    def fetch(index):
        reads.append(array[index].size)
        return array[index]

    return TensorView(array.shape, array.dtype, fetch), reads


def assert_lazy_equal(view, expected):
    assert view.shape == expected.shape and view.dtype == expected.dtype
    np.testing.assert_array_equal(view.read(), expected)
    rng = np.random.default_rng(0)
    for _ in range(30):
        index = []
        for size in view.shape:
            start = int(rng.integers(0, size + 1))
            index.append(slice(start, int(rng.integers(start, size + 1))))
        np.testing.assert_array_equal(view.read(index), expected[tuple(index)])


A = np.arange(24, dtype=np.float32).reshape(4, 6)
B = -np.arange(18, dtype=np.float32).reshape(3, 6)
C = np.arange(60, dtype=np.float32).reshape(3, 4, 5)

CASES = {
    "array": (from_array(C), C),
    "permute": (views.permute(from_array(C), (2, 0, 1)), C.transpose(2, 0, 1)),
    "narrow": (views.narrow(from_array(A), 1, 2), A[1:3]),
    "concatenate": (views.concatenate([from_array(A), from_array(B), from_array(A)]), np.concatenate([A, B, A])),
    "stack": (views.stack([from_array(A), from_array(2 * A), from_array(A.T.copy().T)]), np.stack([A, 2 * A, A])),
    "unstack": (views.unstack(from_array(C), 1), C[1]),
    "squeeze": (views.squeeze(from_array(C[None, None]), 2), C),
    "expand": (views.expand(from_array(C), 2), C[None, None]),
    "cast": (views.cast(from_array(A), np.dtype(np.float16)), A.astype(np.float16)),
    "transposed stack": (views.stack([views.permute(from_array(A), (1, 0))] * 3), np.stack([A.T] * 3)),
}


@pytest.mark.parametrize(("view", "expected"), CASES.values(), ids=CASES)
def test_every_slice_equals_numpy(view, expected):
    assert_lazy_equal(view, expected)


def test_scalars():
    view = from_array(np.float32(3.0).reshape(()))
    assert view.read() == 3.0 and view.shape == () and view.nbytes == 4
    assert views.squeeze(from_array(np.ones((1, 1))), 2).read().shape == ()


def test_negative_and_open_slices_but_no_steps():
    view = from_array(A)
    np.testing.assert_array_equal(view.read((slice(-2, None),)), A[-2:])
    np.testing.assert_array_equal(view.read((slice(3, 1),)), A[3:1])
    with pytest.raises(ValueError, match="step 1"):
        view.read((slice(None, None, 2),))


def test_only_what_a_slice_needs_is_read():
    layers = [spy(A) for _ in range(4)]
    stacked = views.stack([views.permute(view, (1, 0)) for view, _ in layers])
    stacked.read((slice(2, 3), slice(1, 3), slice(0, 4)))
    assert [sum(reads) for _, reads in layers] == [0, 0, 8, 0]
    first, second = spy(A), spy(B)
    views.concatenate([first[0], second[0]]).read((slice(4, 5), slice(0, 3)))
    assert first[1] == [] and second[1] == [3]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("shape", [(37, 70), (3, 21, 40), (5,), ()])
def test_contiguous_copies(dtype, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    turned = array.swapaxes(-1, -2) if array.ndim > 1 else array
    result = views.contiguous(turned)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, turned)
    assert views.contiguous(array) is array
