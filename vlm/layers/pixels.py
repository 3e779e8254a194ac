"""Pixels on the device: 8-bit pictures become the numbers that a vision encoder expects."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vlm.data.image import ImageSettings
from vlm.layers.arrays import AnyArray


def normalise_pixels(image: UInt8[AnyArray, "*b h w 3"], settings: ImageSettings) -> Float[Array, "*b h w 3"]:
    """(pixels · rescale − mean) / std in float32, as `vlm.data.image.process` does it on the host."""
    pixels = jnp.asarray(image, jnp.float32)
    if settings.rescale is not None:
        pixels = pixels * settings.rescale
    if settings.mean is not None and settings.std is not None:
        mean, std = (jnp.asarray(x, jnp.float32).reshape((1,) * (pixels.ndim - 1) + (3,)) for x in
                     (settings.mean, settings.std))  # fmt: skip
        pixels = (pixels - mean) / std
    return pixels
