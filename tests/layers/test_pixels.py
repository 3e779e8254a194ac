"""Normalisation on the device equals normalisation on the host, for every 8-bit value."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlm.data.image import ImageSettings
from vlm.data.image import normalise_pixels as on_host
from vlm.layers.pixels import normalise_pixels


@pytest.mark.parametrize("changes", [{}, {"mean": None, "std": None}, {"rescale": None}])
def test_equals_the_host(changes):
    settings = ImageSettings(16, 16, **changes)
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    found = normalise_pixels(jnp.asarray(pixels), settings)
    np.testing.assert_allclose(found, on_host(pixels, settings), rtol=1e-6, atol=1e-6)
