"""Image settings in the form of Hugging Face's preprocessor_config.json, with all the spellings of its history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.data.image import CLIP_MEAN, CLIP_STD, RESAMPLE, ImageSettings
from vlm.errors import UserError


def read_image_config(config: Mapping[str, Any], name: str, *, square: bool = False) -> ImageSettings:
    """Reads the content of a preprocessor_config.json; absent keys have CLIP's values.

    Args:
        config: old form (`size: 224`, no rescale keys), new form (`size: {"shortest_edge": 224}`), or a
            processor_config.json that holds either under "image_processor".
        name: named in errors.
        square: whether a bare number as `size` means a square rather than the short side.

    Raises:
        UserError: a value of a wrong type, or a step that this pipeline does not have.
    """
    nested = config.get("image_processor")
    config = nested if isinstance(nested, Mapping) else config
    try:
        if config.get("do_pad"):
            raise UserError("do_pad is not supported")
        size, mode = _read_size(config.get("size"), square) if _switch(config, "do_resize") else (None, "exact")
        crop = _read_crop(config.get("crop_size")) if _switch(config, "do_center_crop") else None
        rescale = float(_number(config, "rescale_factor", 1 / 255)) if _switch(config, "do_rescale") else None
        mean = std = None
        if _switch(config, "do_normalize"):
            mean, std = _channels(config, "image_mean", CLIP_MEAN), _channels(config, "image_std", CLIP_STD)
        resample = _number(config, "resample", RESAMPLE.index("bicubic"))
        if resample not in range(len(RESAMPLE)):
            raise UserError(f"resample: expected a number from 0 to {len(RESAMPLE) - 1}, found {resample!r}")
        return ImageSettings(size, crop, mean, std, RESAMPLE[int(resample)], mode, rescale)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def write_image_config(settings: ImageSettings) -> dict[str, Any]:
    """Returns the preprocessor_config.json that makes Hugging Face's CLIPImageProcessor do the same."""
    exact = settings.size if isinstance(settings.size, tuple) else (settings.size, settings.size)
    size = {"height": exact[0], "width": exact[-1]}
    if settings.mode == "shortest_edge" or settings.size is None:
        size = {"shortest_edge": settings.size or 224}
    crop = settings.crop if isinstance(settings.crop, tuple) else (settings.crop or 224,) * 2
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": settings.size is not None,
        "size": size,
        "resample": RESAMPLE.index(settings.resample),
        "do_center_crop": settings.crop is not None,
        "crop_size": {"height": crop[0], "width": crop[-1]},
        "do_rescale": settings.rescale is not None,
        "rescale_factor": settings.rescale if settings.rescale is not None else 1 / 255,
        "do_normalize": settings.mean is not None,
        "image_mean": list(settings.mean or CLIP_MEAN),
        "image_std": list(settings.std or CLIP_STD),
        "do_convert_rgb": True,
    }


def _read_size(size: Any, square: bool) -> tuple[Any, Any]:
    if size is None:
        size = 224
    if isinstance(size, int):
        return size, "exact" if square else "shortest_edge"
    if isinstance(size, (list, tuple)):
        return tuple(size), "exact"
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return size["shortest_edge"], "shortest_edge"
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return (size["height"], size["width"]), "exact"
    raise UserError(f"size: expected a number, shortest_edge, or height and width; found {size!r}")


def _read_crop(size: Any) -> Any:
    if size is None:
        return 224
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        height, width = size["height"], size["width"]
        return height if height == width else (height, width)
    if isinstance(size, int):
        return size
    raise UserError(f"crop_size: expected a number, or height and width; found {size!r}")


def _switch(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{key}: expected true or false, found {value!r}")
    return value is not False


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{key}: expected a number, found {value!r}")
    return value


def _channels(config: Mapping[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value] * 3
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(x, (int, float)) for x in value):
        raise UserError(f"{key}: expected three numbers, found {value!r}")
    red, green, blue = map(float, value)
    return red, green, blue
