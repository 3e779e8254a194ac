"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as BLIP trains with it: ten operations on 8-bit pixels.

Warps follow OpenCV's `warpAffine` on 8-bit pixels, which the published models were trained with: bilinear, with
coordinates in steps of 1/32 pixel. They are NumPy here, equal to the last bit.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = (
    "identity", "auto_contrast", "brightness", "sharpness", "equalize",
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate",
)  # fmt: skip
"""Drawn with replacement, all equally likely."""
FILL = 128
"""What stands where a warp looks outside the picture."""
MAX_LEVEL = 10
_SHEAR, _TRANSLATE, _ROTATE = 0.3, 10.0, 30.0  # at the highest level: share of the other side, pixels, degrees
_COORDINATE_BITS, _FRACTION_BITS = 10, 5
_BORDER = 2


def rand_augment(
    image: Image.Image, rng: np.random.Generator, *, count: int = 2, level: float = 5, probability: float = 0.5
) -> Image.Image:
    """Draws `count` operations and applies each with `probability`.

    Args:
        image: RGB.
        level: strength from 0 to 10. At 5, brightness and sharpness have factor 1, so that they change nothing.

    Returns:
        RGB of the same size. Equal generators give equal results.
    """
    for number in rng.integers(len(OPERATIONS), size=count):
        applied, negative = rng.random() < probability, rng.random() < 0.5
        if applied:
            image = operate(image, OPERATIONS[number], level, negative=bool(negative))
    return image


def operate(image: Image.Image, name: str, level: float, *, negative: bool = False) -> Image.Image:
    """Applies one operation to an RGB picture; `negative` turns the direction of a warp."""
    share = level / MAX_LEVEL
    if name == "identity":
        return image
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name in ("brightness", "sharpness"):
        factor = 1.8 * share + 0.1
        enhance = ImageEnhance.Brightness if name == "brightness" else ImageEnhance.Sharpness
        return image if factor == 1 else enhance(image).enhance(factor)
    matrix = _matrix(name, -share if negative else share, image.width, image.height)
    return Image.fromarray(warp(np.asarray(image), matrix))


def _matrix(name: str, share: float, width: int, height: int) -> Float[np.ndarray, "2 3"]:
    """Where a warp sends pixel (x, y): `matrix @ (x, y, 1)`."""
    if name == "rotate":
        angle = math.radians(_ROTATE * share)
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        return np.array([[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]])
    matrix = np.eye(2, 3)
    if name == "shear_x":
        matrix[0, 1] = _SHEAR * share
    elif name == "shear_y":
        matrix[1, 0] = _SHEAR * share
    elif name == "translate_x":
        matrix[0, 2] = -_TRANSLATE * share
    else:
        matrix[1, 2] = -_TRANSLATE * share
    return matrix.astype(np.float32).astype(np.float64)  # the originals hold these in single precision


def warp(
    pixels: UInt8[np.ndarray, "h w c"], matrix: Float[np.ndarray, "2 3"], fill: int = FILL
) -> UInt8[np.ndarray, "h w c"]:
    """Moves every pixel (x, y) to `matrix @ (x, y, 1)`: bilinear, `fill` outside, as OpenCV's `warpAffine`.

    The inverse map is evaluated in integers: 1/1024 pixel per step, rounded to 1/32 pixel before interpolation.
    """
    height, width, channels = pixels.shape
    a, b, c, d, e, f = _inverse(matrix)
    x, y = (_fixed(a, width), _fixed(d, width)), np.arange(height)
    half = 1 << (_COORDINATE_BITS - _FRACTION_BITS - 1)
    column, column_part = _split(x[0] + (_round((b * y + c) * (1 << _COORDINATE_BITS)) + half)[:, None], width)
    row, row_part = _split(x[1] + (_round((e * y + f) * (1 << _COORDINATE_BITS)) + half)[:, None], height)

    padded = np.full((height + 2 * _BORDER, width + 2 * _BORDER, channels), fill, np.uint8)
    padded[_BORDER:-_BORDER, _BORDER:-_BORDER] = pixels
    stride = padded.shape[1]
    flat = padded.reshape(-1, channels)
    index = row * stride + column
    one = 1 << _FRACTION_BITS
    column_part, row_part = column_part[..., None], row_part[..., None]
    upper = flat[index] * (one - column_part) + flat[index + 1] * column_part
    lower = flat[index + stride] * (one - column_part) + flat[index + stride + 1] * column_part
    total = upper * (one - row_part) + lower * row_part
    return ((total + one * one // 2) >> (2 * _FRACTION_BITS)).astype(np.uint8)


def _inverse(matrix: np.ndarray) -> tuple[float, float, float, float, float, float]:
    (a, b, c), (d, e, f) = matrix.tolist()
    scale = 1 / (a * e - b * d)
    a, b, d, e = e * scale, -b * scale, -d * scale, a * scale
    return a, b, -a * c - b * f, d, e, -d * c - e * f


def _fixed(slope: float, count: int) -> Int[np.ndarray, " n"]:
    return _round(slope * np.arange(count) * (1 << _COORDINATE_BITS))


def _round(value: np.ndarray) -> np.ndarray:
    return np.rint(value).astype(np.int32)


def _split(value: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixel before each coordinate, counted from the border's edge, and the fraction beyond in 1/32."""
    value = value >> (_COORDINATE_BITS - _FRACTION_BITS)
    whole = np.clip(value >> _FRACTION_BITS, -_BORDER, size) + _BORDER
    return whole, value & ((1 << _FRACTION_BITS) - 1)
