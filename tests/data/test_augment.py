"""Random crops, flips and colours: what the generator decides, and the ranges it may decide in."""

import numpy as np
import pytest
from PIL import Image

from vlm.data.augment import AugmentSettings, augment, random_box
from vlm.data.image import ImageSettings, normalise_pixels, process
from vlm.errors import UserError

SETTINGS = ImageSettings(24, 24)
NOISE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 60, 3), np.uint8))
EVERYTHING = AugmentSettings((0.3, 1.0), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2)
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def run(image, options, seed=0, settings=SETTINGS, **keywords):
    return augment(image, settings, options, np.random.default_rng(seed), **keywords)


def test_equal_generators_give_equal_pictures_and_others_differ():
    state = np.random.get_state()[1].tolist()
    first = run(NOISE, EVERYTHING)
    assert (first.dtype, first.shape) == (np.float32, (24, 24, 3))
    np.testing.assert_array_equal(first, run(NOISE, EVERYTHING))
    assert len({run(NOISE, EVERYTHING, seed).tobytes() for seed in range(20)}) == 20
    assert np.random.get_state()[1].tolist() == state


def test_uint8_output_is_the_same_picture():
    pixels = run(NOISE, EVERYTHING, normalise=False)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(normalise_pixels(pixels, SETTINGS), run(NOISE, EVERYTHING))


def test_with_everything_off_a_square_picture_is_only_resized():
    square = NOISE.resize((50, 50))
    np.testing.assert_array_equal(run(square, AugmentSettings(**WHOLE)), process(square, SETTINGS))


def test_boxes_stay_inside_and_keep_to_scale_and_ratio():
    options, rng = AugmentSettings((0.2, 0.3), (0.5, 2.0)), np.random.default_rng(0)
    boxes = np.array([random_box(300, 200, options, rng) for _ in range(2000)])
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 300
    assert boxes[:, 3].max() <= 200
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = width * height / 60_000, width / height
    assert 0.19 < share.min() < 0.21
    assert 0.29 < share.max() < 0.31
    assert 0.49 < ratio.min() < 0.55
    assert 1.8 < ratio.max() < 2.03
    assert abs(np.log(ratio).mean()) < 0.05


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1))]
)
def test_extreme_pictures_fall_back_to_the_central_box(size, expected):
    box = random_box(*size, AugmentSettings((1.0, 1.0)), np.random.default_rng(0))
    assert box == pytest.approx(expected, abs=1)


def test_the_flip_mirrors_with_its_probability():
    square = NOISE.resize((24, 24))
    plain = process(square, SETTINGS)
    np.testing.assert_array_equal(run(square, AugmentSettings(**WHOLE, flip=1.0)), plain[:, ::-1])
    flipped = [not (run(square, AugmentSettings(**WHOLE, flip=0.3), seed) == plain).all() for seed in range(300)]
    assert 0.22 < np.mean(flipped) < 0.38


def test_a_crop_never_looks_outside_its_box():
    stripes = np.zeros((40, 60, 3), np.uint8)
    stripes[:, ::2] = 255
    options = AugmentSettings((0.3, 0.3))
    for seed in range(5):
        left, top, right, bottom = random_box(60, 40, options, np.random.default_rng(seed))
        outside = stripes.copy()
        outside[:top], outside[bottom:], outside[:, :left], outside[:, right:] = 255, 0, 0, 255
        images = (Image.fromarray(stripes), Image.fromarray(outside))
        np.testing.assert_array_equal(*(run(image, options, seed) for image in images))


def test_rand_augment_comes_last():
    square = NOISE.resize((24, 24))
    drawn = [run(square, AugmentSettings(**WHOLE, rand_augment=2), seed, normalise=False) for seed in range(30)]
    plain = process(square, SETTINGS, normalise=False)
    changed = [image for image in drawn if (image != plain).any()]
    assert 5 < len(changed) < 25
    assert any((image == 128).all(axis=-1).sum() > 24 for image in changed)


def test_colour_changes_act_on_what_they_name():
    grey = Image.new("RGB", (30, 30), (100, 100, 100))
    red = Image.new("RGB", (30, 30), (200, 40, 40))

    def levels(image, **options):
        pixels = [run(image, AugmentSettings(**WHOLE, **options), seed, normalise=False)[12, 12] for seed in range(200)]
        return np.array(pixels, int)

    bright = levels(grey, brightness=0.5)
    assert (bright.min(), bright.max()) == pytest.approx((50, 150), abs=2)
    assert (levels(grey, saturation=0.5, hue=0.3) == 100).all()
    saturated = levels(red, saturation=0.5)
    spread = saturated[:, 0] - saturated[:, 1]
    assert (spread.min(), spread.max()) == pytest.approx((80, 239), abs=4)
    shifted = levels(red, hue=0.5)
    assert (shifted[:, 1] > shifted[:, 0]).any()
    assert (np.abs(shifted.max(axis=1) - 200) <= 2).all()
    drained = levels(red, grayscale=1.0)
    assert (drained == drained[:, :1]).all()
    assert (levels(red, brightness=0.5, jitter=0.0) == levels(red)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"hue": 0.6}, "hue"),
        ({"brightness": -0.1}, "brightness"),
        ({"rand_augment": -1}, "rand_augment"),
        ({"rand_augment_level": 11.0}, "rand_augment"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=f"augment {message}: expected"):
        AugmentSettings(**options)


def test_settings_without_a_fixed_size_are_refused():
    with pytest.raises(UserError, match="fixed size"):
        run(NOISE, EVERYTHING, settings=ImageSettings(crop=None))
