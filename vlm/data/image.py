"""Pictures to arrays: safe decoding, and resizing, cropping and normalising bit for bit as CLIP's PIL pipeline does.

Only the decoders of allowed formats ever run, and the size in the header is checked before a pixel is decoded.
EXIF is ignored, also its orientation, because the published models saw such pictures unturned.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from vlm.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000
MAX_ASPECT = 50.0
MAX_BYTES = 256 * 2**20
DEFAULT_FORMATS = ("JPEG", "PNG", "WEBP")
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in PIL's numbering

_FORMATS: dict[str, tuple[Any, tuple[bytes, ...]]] = {
    "JPEG": (JpegImagePlugin.JpegImageFile, (b"\xff\xd8\xff",)),
    "PNG": (PngImagePlugin.PngImageFile, (b"\x89PNG\r\n\x1a\n",)),
    "WEBP": (WebPImagePlugin.WebPImageFile, (b"RIFF",)),
    "GIF": (GifImagePlugin.GifImageFile, (b"GIF87a", b"GIF89a")),
    "BMP": (BmpImagePlugin.BmpImageFile, (b"BM",)),
    "TIFF": (TiffImagePlugin.TiffImageFile, (b"II*\0", b"MM\0*")),
}
_STRIP_PIXELS = 4_000_000

ImageInput = str | Path | bytes | Image.Image | np.ndarray
"""Path, encoded bytes, PIL image, or uint8 array [H, W], [H, W, 3] or [H, W, 4]."""


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes the model's input.

    Attributes:
        size: "shortest_edge": the short side after resizing; "exact": (height, width), or one number for a
            square. None: no resizing.
        crop: (height, width) of the centre crop, or one number for a square; smaller pictures get a black
            border. None: no cropping.
        mean, std: per channel, applied after `rescale`. Both None: no normalisation.
        resample: PIL's filter.
        mode: keep the aspect ratio, or squash to `size`.
        rescale: factor on the 8-bit values; None: no rescaling.
    """

    size: int | tuple[int, int] | None = 224
    crop: int | tuple[int, int] | None = 224
    mean: tuple[float, float, float] | None = CLIP_MEAN
    std: tuple[float, float, float] | None = CLIP_STD
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    mode: Literal["shortest_edge", "exact"] = "shortest_edge"
    rescale: float | None = 1 / 255

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and (len(numbers) not in (1, 2) or not all(map(_is_side, numbers))):
                raise UserError(f"image {name}: expected one or two numbers of pixels, found {value!r}")
        if self.mode not in ("shortest_edge", "exact"):
            raise UserError(f"image mode is 'shortest_edge' or 'exact', found {self.mode!r}")
        if self.mode == "shortest_edge" and isinstance(self.size, tuple):
            raise UserError(f"image size: 'shortest_edge' takes one number, found {self.size}")
        if self.resample not in RESAMPLE:
            raise UserError(f"image resample: expected one of {', '.join(RESAMPLE)}, found {self.resample!r}")
        if (self.mean is None) != (self.std is None):
            raise UserError("image mean and std: give both or neither")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (len(value) != 3 or not all(map(math.isfinite, value))):
                raise UserError(f"image {name}: expected three numbers, found {value!r}")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UserError(f"image std must be positive, found {self.std}")

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of the result, or None where it depends on the picture."""
        if self.crop is not None:
            return _both(self.crop)
        return _both(self.size) if self.mode == "exact" and self.size is not None else None

    def for_side(self, side: int) -> ImageSettings:
        """Settings for squares of another size; where these cut out a square, it keeps its share of the picture."""
        size, crop = self.size, self.crop
        if crop is None:
            return dataclasses.replace(self, size=side)
        scaled = round(size * side / crop) if isinstance(size, int) and isinstance(crop, int) else side
        return dataclasses.replace(self, size=scaled if size is not None else None, crop=side)


def decode(
    data: bytes | str | Path,
    *,
    name: str | None = None,
    max_pixels: float = MAX_PIXELS,
    max_aspect: float = MAX_ASPECT,
    formats: Sequence[str] = DEFAULT_FORMATS,
) -> Image.Image:
    """Decodes a picture, given as encoded bytes or as a path, to RGB (of an animation the first frame).

    Args:
        name: what errors call it; by default the path.
        max_pixels, max_aspect: limits on width × height and on long / short side, checked from the header.
        formats: allowed formats, of JPEG, PNG, WEBP, GIF, BMP, TIFF. The content counts, not the file name.

    Raises:
        UserError: one line naming the picture: not there, another format, too large, truncated or damaged.
    """
    unknown = [name_ for name_ in formats if name_ not in _FORMATS]
    if unknown:
        raise UserError(f"unknown image format {unknown[0]!r}; choose from {', '.join(_FORMATS)}")
    name = name or (str(data) if isinstance(data, (str, Path)) else "image")
    if isinstance(data, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(data), len(data), name, max_pixels, max_aspect, formats)
    if not isinstance(data, (str, Path)):
        raise UserError(f"{name}: expected encoded bytes or a path, found {type(data).__name__}")
    path = Path(data)
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    with path.open("rb") as file:
        return _decode(file, path.stat().st_size, name, max_pixels, max_aspect, formats)


def _decode(
    file: IO[bytes], size: int, name: str, max_pixels: float, max_aspect: float, formats: Sequence[str]
) -> Image.Image:
    if size > MAX_BYTES:
        raise UserError(f"{name}: {size:,} bytes, more than the limit of {MAX_BYTES:,}")
    start = file.read(16)
    file.seek(0)
    found = next((key for key, (_, magics) in _FORMATS.items() if start.startswith(magics)), None)
    if found == "WEBP" and start[8:12] != b"WEBP":
        found = None
    if found is None or found not in formats:
        what = f"a {found} picture" if found else "not a picture" if start else "empty"
        raise UserError(f"{name}: {what}; expected {' or '.join(formats)}")
    try:
        # The plugin's class instead of Image.open: no other decoder can be reached, and nothing warns about sizes
        # that are refused here anyway.
        image = _FORMATS[found][0](file)
        _check_size(image.size, name, max_pixels, max_aspect)
        image.load()
        return to_rgb(image)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything from OSError to struct.error on damaged data
        raise UserError(f"{name}: damaged {found} picture ({error or type(error).__name__})") from None


def _check_size(size: tuple[int, int], name: str, max_pixels: float, max_aspect: float) -> None:
    width, height = size
    if min(size) < 1:
        raise UserError(f"{name}: {width} x {height} pixels")
    if width * height > max_pixels:
        raise UserError(f"{name}: {width} x {height} pixels, more than the limit of {max_pixels:,.0f}")
    if max(size) > max_aspect * min(size):
        raise UserError(f"{name}: {width} x {height} pixels, an aspect ratio above the limit of {max_aspect:g}:1")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to 8-bit RGB; transparency is laid over white, 16-bit values are clipped to 255."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if not transparent:
        return image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    if rows >= height:
        return _over_white(image)
    result = Image.new("RGB", image.size)  # strip by strip: three RGBA copies of a large picture are a gigabyte
    for top in range(0, height, rows):
        result.paste(_over_white(image.crop((0, top, width, min(top + rows, height)))), (0, top))
    return result


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")  # the same pixels, several times faster
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def open_image(image: ImageInput, name: str) -> Image.Image:
    """Decodes or wraps one image of any accepted kind as RGB.

    Raises:
        UserError: not a picture; `name` says which one.
    """
    if isinstance(image, (str, Path)):
        return decode(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode(bytes(image), name=name)
    if isinstance(image, Image.Image):
        try:
            image.load()
            return to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:  # a picture that PIL opened but cannot decode
            raise UserError(f"{name}: damaged picture ({error})") from None
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
            found = f"{image.dtype}{list(image.shape)}"
            raise UserError(f"{name}: expected uint8[H, W], [H, W, 3] or [H, W, 4], found {found}")
        if not pixels.size:
            raise UserError(f"{name}: an image without pixels, {list(image.shape)}")
        return to_rgb(Image.fromarray(pixels))
    raise UserError(f"{name}: expected a path, bytes, a PIL image or a uint8 array, found {type(image).__name__}")


def process(image: Image.Image, settings: ImageSettings, *, normalise: bool = True) -> np.ndarray:
    """Resizes, centre-crops and normalises a picture.

    Args:
        image: any mode; converted to RGB first.
        normalise: False returns the pixels before rescaling and normalisation, for doing both on the device.

    Returns:
        float32[H, W, 3], or uint8[H, W, 3] without normalisation. The values equal Hugging Face's
        CLIPImageProcessor (PIL backend) bit for bit.
    """
    pixels = centre_crop(resize(to_rgb(image), settings), settings.crop)
    return normalise_pixels(pixels, settings) if normalise else pixels


def resize(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Resizes to `settings.size`; with "shortest_edge" the long side is truncated to whole pixels."""
    if settings.size is None:
        return image
    width, height = image.size
    if isinstance(settings.size, int) and settings.mode == "shortest_edge":
        long = int(settings.size * max(width, height) / min(width, height))
        target = (settings.size, long) if width <= height else (long, settings.size)
    else:
        height, width = _both(settings.size)
        target = (width, height)
    return image.resize(target, resample=RESAMPLE.index(settings.resample))


def centre_crop(image: Image.Image, crop: int | tuple[int, int] | None) -> np.ndarray:
    """Returns uint8[H, W, 3]: the centre, offset rounded down; what lies outside the picture is black."""
    pixels = np.asarray(image)
    if crop is None:
        return pixels
    size = _both(crop)
    offsets = [(have - want) // 2 for have, want in zip(pixels.shape[:2], size, strict=True)]
    source = tuple(slice(max(o, 0), max(o, 0) + want) for o, want in zip(offsets, size, strict=True))
    inside = pixels[source]
    if inside.shape[:2] == size:
        return inside
    result = np.zeros((*size, 3), np.uint8)
    top, left = (max(-o, 0) for o in offsets)
    result[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return result


def normalise_pixels(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """Returns (pixels · rescale − mean) / std as float32, for uint8[..., 3]."""
    table = _normalisation_table(settings.rescale, settings.mean, settings.std)
    result = np.empty(pixels.shape, np.float32)
    for channel in range(3):
        result[..., channel] = table[channel][pixels[..., channel]]
    return result


@functools.lru_cache(maxsize=64)
def _normalisation_table(
    rescale: float | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> np.ndarray:
    """float32[3, 256]: the result for every 8-bit value, rounded to float32 where the original rounds."""
    values = np.arange(256, dtype=np.float64)
    values = (values * rescale if rescale is not None else values).astype(np.float32)
    table = np.repeat(values[None], 3, axis=0)
    if mean is not None and std is not None:
        table = (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    table.setflags(write=False)
    return table


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 16384


def _both(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
