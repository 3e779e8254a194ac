"""RandAugment against references written out per pixel, and what its draws are."""

import math

import numpy as np
import pytest
from PIL import Image

from vlm.data.rand_augment import OPERATIONS, operate, rand_augment, warp

NOISE = np.random.default_rng(3).integers(20, 200, (13, 17, 3), np.uint8)
PICTURE = Image.fromarray(NOISE)


def pixels(name, level=5.0, image=PICTURE, **options):
    return np.asarray(operate(image, name, level, **options))


def slow_warp(image, matrix, fill=128):
    """OpenCV's fixed-point `warpAffine`, one pixel at a time in Python integers."""
    height, width, _ = image.shape
    inverse = np.linalg.inv(np.vstack([np.asarray(matrix, float), [0, 0, 1]]))
    result = np.empty_like(image)

    def value(x, y):
        inside = 0 <= x < width and 0 <= y < height
        return image[y, x].astype(int) if inside else np.full(3, fill)

    for y in range(height):
        for x in range(width):
            at = []
            for row in inverse[:2]:
                fixed = round(row[0] * x * 1024) + round((row[1] * y + row[2]) * 1024) + 16
                at.append(divmod(fixed // 32, 32))
            (left, dx), (top, dy) = at
            total = sum(
                value(left + i, top + j) * ((32 - dx, dx)[i] * (32 - dy, dy)[j]) for i in range(2) for j in range(2)
            )
            result[y, x] = (total + 512) // 1024
    return result


def rotation(width, height, degrees):
    turn, x, y = math.radians(degrees), width / 2, height / 2
    cos, sin = math.cos(turn), math.sin(turn)
    return [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]]


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("shear_x", lambda s: [[1, np.float32(0.15 * s), 0], [0, 1, 0]]),
        ("shear_y", lambda s: [[1, 0, 0], [np.float32(0.15 * s), 1, 0]]),
        ("translate_x", lambda s: [[1, 0, -5 * s], [0, 1, 0]]),
        ("translate_y", lambda s: [[1, 0, 0], [0, 1, -5 * s]]),
        ("rotate", lambda s: rotation(17, 13, 15 * s)),
    ],
)
@pytest.mark.parametrize("negative", [False, True])
def test_warps_equal_the_pixelwise_reference(name, matrix, negative):
    expected = slow_warp(NOISE, matrix(-1 if negative else 1))
    np.testing.assert_array_equal(pixels(name, negative=negative), expected)
    assert (expected == 128).all(axis=-1).any()
    assert (expected != NOISE).any()


def test_what_a_warp_uncovers_is_grey_and_far_outside_is_safe():
    moved = pixels("translate_x")
    np.testing.assert_array_equal(moved[:, :12], NOISE[:, 5:])
    assert (moved[:, 12:] == 128).all()
    assert (warp(NOISE, np.array([[1.0, 0, 1e4], [0, 1, -1e4]])) == 128).all()


@pytest.mark.parametrize("name", ["identity", "brightness", "sharpness"])
def test_at_level_five_brightness_and_sharpness_change_nothing(name):
    np.testing.assert_array_equal(pixels(name), NOISE)
    if name != "identity":
        assert (pixels(name, 8) != NOISE).any()


def test_brightness_scales_the_pixels():
    np.testing.assert_allclose(pixels("brightness", 0), NOISE * 0.1, atol=1)
    np.testing.assert_allclose(pixels("brightness", 10), np.minimum(NOISE * 1.9, 255), atol=1)


def test_auto_contrast_stretches_every_channel():
    expected = np.empty_like(NOISE)
    for channel in range(3):
        low, high = (int(f(NOISE[..., channel])) for f in (np.min, np.max))
        scale = 255 / (high - low)
        table = np.clip(np.arange(256) * scale - low * scale, 0, 255).astype(np.uint8)
        expected[..., channel] = table[NOISE[..., channel]]
    np.testing.assert_array_equal(pixels("auto_contrast"), expected)
    flat = Image.new("RGB", (4, 4), (7, 200, 0))
    np.testing.assert_array_equal(pixels("auto_contrast", image=flat), np.asarray(flat))


@pytest.mark.parametrize("size", [(13, 17), (40, 50), (4, 4)])
def test_equalize_flattens_the_histogram_of_every_channel(size):
    image = (np.random.default_rng(0).beta(2, 6, (*size, 3)) * 256).astype(np.uint8)
    expected = image.copy()
    for channel in range(3):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        step = counts[counts > 0][:-1].sum() // 255
        if step:
            table = np.cumsum(np.concatenate([[step // 2], counts[:-1]])) // step
            expected[..., channel] = np.clip(table, 0, 255)[image[..., channel]]
    np.testing.assert_array_equal(pixels("equalize", image=Image.fromarray(image)), expected)


def test_two_operations_are_drawn_evenly_and_each_applied_half_of_the_time():
    image = Image.fromarray(NOISE[:8, :8])
    outcomes = [rand_augment(image, np.random.default_rng(seed)) for seed in range(2000)]
    unchanged = np.mean([np.array_equal(np.asarray(x), NOISE[:8, :8]) for x in outcomes])
    # Of ten operations identity, brightness, sharpness (and equalize, on 64 pixels) change nothing.
    assert unchanged == pytest.approx((1 - 0.5 * 6 / 10) ** 2, abs=0.04)
    assert len({x.tobytes() for x in outcomes}) > 60
    again = [rand_augment(image, np.random.default_rng(seed)).tobytes() for seed in range(50)]
    assert again == [x.tobytes() for x in outcomes[:50]]
    assert len(set(OPERATIONS)) == 10
