"""Maps over an image's patches, drawn on the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

PANEL, LABEL, GAP, COLUMNS = 256, 20, 8, 4
STRENGTH = 0.65


def overlay(image: Image.Image, values: Float[np.ndarray, "h w"]) -> Image.Image:
    """The image with warm colours where the map is high; a map without positive values leaves it as it is."""
    top = float(values.max())
    share = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    heat = Image.fromarray(np.asarray(share * 255, np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    strength = np.asarray(heat, np.float32)[..., None] / 255
    colour = np.concatenate([np.full_like(strength, 255), 255 * strength, np.zeros_like(strength)], axis=-1)
    weight = STRENGTH * strength
    pixels = np.asarray(image.convert("RGB"), np.float32)
    return Image.fromarray(np.asarray((1 - weight) * pixels + weight * colour, np.uint8))


def sheet(image: Image.Image, panels: Sequence[tuple[str, Float[np.ndarray, "h w"]]]) -> Image.Image:
    """The image itself, then one panel with a label for each map, in rows of four."""
    shape = image.convert("RGB")
    scale = PANEL / max(shape.size)
    resample = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BICUBIC
    shape = shape.resize([max(1, round(side * scale)) for side in shape.size], resample)
    drawn = [("", shape), *((name, overlay(shape, values)) for name, values in panels)]
    width, height = shape.width + GAP, shape.height + LABEL + GAP
    rows = -(-len(drawn) // COLUMNS)
    page = Image.new("RGB", (min(COLUMNS, len(drawn)) * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(page)
    for number, (name, panel) in enumerate(drawn):
        left, top = GAP + number % COLUMNS * width, GAP + number // COLUMNS * height
        page.paste(panel, (left, top + LABEL))
        pen.text((left, top + 4), name[: shape.width // 6].encode("latin-1", "replace").decode("latin-1"), "black")
    return page
