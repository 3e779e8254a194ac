"""Training-time variation of pictures, driven by nothing but the generator that is passed in."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlm.data.image import RESAMPLE, ImageSettings, normalise_pixels, to_rgb
from vlm.data.rand_augment import MAX_LEVEL, rand_augment
from vlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class AugmentSettings:
    """Random resized crop ("Going deeper with convolutions", 2014), flip and colour changes.

    Attributes:
        scale: range of the cropped share of the picture's area.
        ratio: range of the crop's width / height before it is resized; drawn evenly on a log scale.
        flip: probability of mirroring left and right. Off by default: captions name sides.
        brightness, contrast, saturation: each factor is drawn from [1 − x, 1 + x].
        hue: shift drawn from [−x, x] turns of the colour circle.
        jitter: probability that the colour changes are applied at all, in random order.
        grayscale: probability of dropping the colours.
        rand_augment: number of RandAugment's operations, drawn last (see `rand_augment.py`; BLIP has 2).
        rand_augment_level: their strength from 0 to 10.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 1.0
    grayscale: float = 0.0
    rand_augment: int = 0
    rand_augment_level: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"augment scale: expected 0 < low <= high <= 1, found {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"augment ratio: expected 0 < low <= high, found {self.ratio}")
        limits = dict.fromkeys(("flip", "brightness", "contrast", "saturation", "jitter", "grayscale"), 1.0)
        for name, limit in {**limits, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"augment {name}: expected 0 to {limit:g}, found {getattr(self, name)}")
        if self.rand_augment < 0 or not 0 <= self.rand_augment_level <= MAX_LEVEL:
            found = f"{self.rand_augment} at level {self.rand_augment_level}"
            raise UserError(f"augment rand_augment: expected at least 0 operations at level 0 to 10, found {found}")


def augment(
    image: Image.Image,
    settings: ImageSettings,
    options: AugmentSettings,
    rng: np.random.Generator,
    *,
    normalise: bool = True,
) -> np.ndarray:
    """Crops at random to the model's input size, varies and normalises a picture.

    Returns:
        float32[H, W, 3], or uint8[H, W, 3] without normalisation. Equal generators give equal results.

    Raises:
        UserError: `settings` do not fix an output size.
    """
    if settings.output_size is None:
        raise UserError("random crops need a fixed size: set image crop, or mode 'exact'")
    height, width = settings.output_size
    image = to_rgb(image)
    box = random_box(image.width, image.height, options, rng)
    # Cropped first: with `box` the filter would look at pixels outside the crop.
    image = image.crop(box).resize((width, height), resample=RESAMPLE.index(settings.resample))
    if rng.random() < options.flip:
        image = ImageOps.mirror(image)
    if rng.random() < options.jitter:
        image = _vary_colours(image, options, rng)
    if rng.random() < options.grayscale:
        image = image.convert("L").convert("RGB")
    if options.rand_augment:
        image = rand_augment(image, rng, count=options.rand_augment, level=options.rand_augment_level)
    pixels = np.asarray(image)
    return normalise_pixels(pixels, settings) if normalise else pixels


def random_box(
    width: int, height: int, options: AugmentSettings, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws (left, top, right, bottom) inside a picture; ten failures end with the largest central box."""
    low, high = options.ratio
    for _ in range(10):
        area = width * height * rng.uniform(*options.scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = (int(rng.integers(0, room + 1)) for room in (width - box_width, height - box_height))
            return left, top, left + box_width, top + box_height
    box_width = max(1, min(width, round(height * high)))
    box_height = max(1, min(height, round(width / low)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _vary_colours(image: Image.Image, options: AugmentSettings, rng: np.random.Generator) -> Image.Image:
    steps = (
        (options.brightness, ImageEnhance.Brightness),
        (options.contrast, ImageEnhance.Contrast),
        (options.saturation, ImageEnhance.Color),
        (options.hue, None),
    )
    for index in rng.permutation(len(steps)):
        strength, enhancer = steps[index]
        draw = rng.uniform(-strength, strength)
        if strength == 0:
            continue
        image = _shift_hue(image, draw) if enhancer is None else enhancer(image).enhance(1 + draw)
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turns * 256)
    return Image.merge("HSV", (hue.point([(level + shift) % 256 for level in range(256)]), saturation, value)).convert(
        "RGB"
    )
