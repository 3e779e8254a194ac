"""FLAVA's picture settings in the form of Hugging Face's preprocessor_config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm.data.image import RESAMPLE, ImageSettings
from vlm.data.image_config import read_image_config, write_image_config
from vlm.errors import UserError

_BLOCKS = {
    "min_patches": "mask_group_min_patches",
    "max_patches": "mask_group_max_patches",
    "min_aspect": "mask_group_min_aspect_ratio",
    "max_aspect": "mask_group_max_aspect_ratio",
}
_CODEBOOK = {"codebook_resample": RESAMPLE.index("lanczos"), "codebook_do_map_pixels": True}
_CODEBOOK |= {"codebook_do_resize": True, "codebook_do_rescale": True, "codebook_rescale_factor": 1 / 255}
_NORMALISED = {"codebook_image_mean": [0.0] * 3, "codebook_image_std": [1.0] * 3}
_SWITCHES = ("codebook_do_center_crop", "codebook_do_normalize")


def read_image_settings(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings `image`, `patch_size`, `mask_patches`, `blocks` and `codebook_size` of a `ProcessorConfig`.

    Raises:
        UserError: a value of a wrong type, or a step that this pipeline does not have; `name` is the file.
    """
    nested = config.get("image_processor")
    config = nested if isinstance(nested, Mapping) else config
    image = read_image_config({"size": {"height": 224, "width": 224}} | dict(config), name, square=True)
    sides = image.size if isinstance(image.size, tuple) else (image.size, image.size)
    if sides[0] == sides[-1]:
        image = dataclasses.replace(image, size=sides[0])
    if image.crop in (image.size, sides):  # it cuts nothing off
        image = dataclasses.replace(image, crop=None)
    settings: dict[str, Any] = {"image": image, "mask_patches": config.get("total_mask_patches", 75)}
    grid, side = config.get("input_size_patches", 14), (image.output_size or (224, 224))[0]
    if not isinstance(grid, int) or isinstance(grid, bool) or grid < 1 or side % grid:
        raise UserError(f"{name}: input_size_patches: expected a divisor of {side}, found {grid!r}")
    settings["patch_size"] = side // grid
    blocks = {ours: config[theirs] for ours, theirs in _BLOCKS.items() if config.get(theirs) is not None}
    return settings | {"blocks": blocks, "codebook_size": _codebook_size(config, name)}


def _codebook_size(config: Mapping[str, Any], name: str) -> int:
    """Side of the codebook's picture; everything else about it is fixed."""
    given = {key: value for key, value in config.items() if value is not None}
    crops, normalises = (given.get(key, True) for key in _SWITCHES)
    for key, value in zip(_SWITCHES, (crops, normalises), strict=True):
        if not isinstance(value, bool):
            raise UserError(f"{name}: {key}: expected true or false, found {value!r:.80}")
    for key, expected in (_CODEBOOK | (_NORMALISED if normalises else {})).items():
        if (found := given.get(key, expected)) not in (expected, tuple(expected) if key in _NORMALISED else expected):
            raise UserError(f"{name}: {key}: expected {expected}, found {found!r:.80}")
    sizes = [given.get(key) or 112 for key in ("codebook_size", "codebook_crop_size")[: 1 + crops]]
    sides = {side for size in sizes for side in (size.values() if isinstance(size, Mapping) else [size])}
    if len(sides) > 1 or not all(isinstance(side, int) for side in sides):
        raise UserError(f"{name}: codebook_size: expected one square size, found {sizes}")
    return sides.pop()


def write_image_settings(config: Any) -> dict[str, Any]:
    """The preprocessor_config.json of a `ProcessorConfig` for Hugging Face's FlavaImageProcessor."""
    image: ImageSettings = config.image
    if image.crop is None and image.size is not None:  # FLAVA's class always crops, to 224 unless told otherwise
        image = dataclasses.replace(image, crop=image.size)
    result = write_image_config(image)
    result |= {"image_processor_type": "FlavaImageProcessor", "processor_class": "FlavaProcessor"}
    result |= {theirs: getattr(config.blocks, ours) for ours, theirs in _BLOCKS.items()}
    size = config.codebook_size or 112
    result |= {"codebook_size": {"height": size, "width": size}, "codebook_crop_size": {"height": size, "width": size}}
    result |= {**_CODEBOOK, **_NORMALISED, **dict.fromkeys(_SWITCHES, True)}
    if config.grid is not None:
        result["input_size_patches"] = config.grid[0]
    return result | {"total_mask_patches": config.mask_patches}
