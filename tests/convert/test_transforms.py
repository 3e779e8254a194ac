"""Each transform equals its definition in NumPy, and its two directions are inverse on every slice."""

import numpy as np
import pytest
import torch

from vlm.convert import transforms as t
from vlm.convert.views import TensorView, from_array
from vlm.errors import UserError

rng = np.random.default_rng(0)


def random(*shape):
    return rng.normal(size=shape).astype(np.float32)


W, QKV, CONV, TOKEN = random(3, 5), random(6, 4), random(7, 3, 2, 2), random(1, 1, 4)

CASES = {
    "identity": (t.IDENTITY, W, [W]),
    "transpose": (t.TRANSPOSE, W, [W.T]),
    "convolution": (t.CONVOLUTION, CONV, [CONV.transpose(2, 3, 1, 0)]),
    # row (row 1, column 0, channel 2) of the kernel is number (1 * 2 + 0) * 3 + 2
    "patch kernel": (
        t.PATCH_KERNEL,
        CONV,
        [np.stack([CONV[:, c, r, k] for r in range(2) for k in range(2) for c in range(3)])],
    ),
    "split": (t.SPLIT_QKV, QKV, [QKV[:2], QKV[2:4], QKV[4:]]),
    "split kernel": (t.SPLIT_QKV_KERNEL, QKV, [QKV[:2].T, QKV[2:4].T, QKV[4:].T]),
    "split bias": (t.SPLIT_QKV, QKV[:, 0], [QKV[:2, 0], QKV[2:4, 0], QKV[4:, 0]]),
    "leading ones": (t.leading_ones(2), TOKEN, [TOKEN[0, 0]]),
}


@pytest.mark.parametrize(("transform", "foreign", "ours"), CASES.values(), ids=CASES)
def test_both_directions(transform, foreign, ours):
    views = transform.forward(from_array(foreign))
    assert len(views) == len(ours)
    for view, expected in zip(views, ours, strict=True):
        assert view.shape == expected.shape
        np.testing.assert_array_equal(view.read(), expected)
        index = tuple(slice(size // 3, size) for size in expected.shape)
        np.testing.assert_array_equal(view.read(index), expected[index])
    back = transform.backward(views)
    assert back.shape == foreign.shape
    np.testing.assert_array_equal(back.read(), foreign)
    index = tuple(slice(size // 3, size) for size in foreign.shape)
    np.testing.assert_array_equal(back.read(index), foreign[index])


def test_scalar_accepts_one_number_of_any_shape():
    for shape in ((), (1,), (1, 1)):
        (view,) = t.SCALAR.forward(from_array(np.full(shape, 2.5)))
        assert view.shape == () and view.read() == 2.5


def test_leading_ones_accepts_vectors_as_they_are():
    (view,) = t.leading_ones(2).forward(from_array(TOKEN[0, 0]))
    assert view.shape == (4,)


@pytest.mark.parametrize(
    ("transform", "shape", "message"),
    [
        (t.TRANSPOSE, (3,), "2 dimensions"),
        (t.PATCH_KERNEL, (7, 4, 2, 2), r"\[E, 3, p, p\]"),
        (t.PATCH_KERNEL, (7, 3, 2, 4), r"\[E, 3, p, p\]"),
        (t.SPLIT_QKV, (7, 2), "divisible by 3"),
        (t.SPLIT_QKV, (), "divisible by 3"),
        (t.SCALAR, (2,), "single number"),
    ],
)
def test_wrong_shapes_say_what_was_expected(transform, shape, message):
    with pytest.raises(ValueError, match=message):
        transform.forward(from_array(np.zeros(shape)))


@pytest.mark.parametrize(("old", "new", "prefix"), [(3, 5, 1), (5, 3, 1), (4, 7, 0)])
def test_a_resized_table_is_pytorchs_bicubic_and_lazy(old, new, prefix):
    table = np.random.default_rng(0).normal(size=(prefix + old * old, 6)).astype(np.float32)
    reads = []
    view = TensorView(table.shape, table.dtype, lambda index: reads.append(index) or table[index])
    resized = t.resize_table(view, new, prefix)
    assert resized.shape == (prefix + new * new, 6) and not reads
    square = torch.tensor(table[prefix:].reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    found = resized.read()
    np.testing.assert_array_equal(found[:prefix], table[:prefix])
    np.testing.assert_allclose(found[prefix:], expected[0].permute(1, 2, 0).reshape(-1, 6).numpy(), atol=1e-5)
    np.testing.assert_array_equal(resized.read((slice(2, 4), slice(1, 3))), found[2:4, 1:3])
    assert t.resize_table(view, old, prefix) is view


def test_a_table_that_is_no_square_is_refused():
    with pytest.raises(UserError, match="1 rows and a square of patches, found 9 rows"):
        t.resize_table(from_array(np.zeros((9, 2), np.float32)), 4)


def test_whole_numbers_become_32_bits_and_back():
    array = np.array([-100, 2**31 - 1])
    (view,) = t.INT32.forward(from_array(array))
    assert view.read().dtype == np.int32 and view.read().tolist() == array.tolist()
    back = t.INT32.backward([view])
    assert back.dtype == np.int64 and back.read().tolist() == array.tolist()
    with pytest.raises(UserError, match="do not fit into 32 bits"):
        t.INT32.forward(from_array(array + 1))[0].read()
    with pytest.raises(ValueError, match="whole numbers"):
        t.INT32.forward(from_array(np.zeros(2)))
