"""Each transform equals its definition in NumPy, and its two directions are inverse on every slice."""

import numpy as np
import pytest

from vlm.convert import transforms as t
from vlm.convert.views import from_array

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
