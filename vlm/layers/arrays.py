"""What public functions take as an array: jax's own, traced or not, or NumPy's. They return jax's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

AnyArray = jax.Array | np.ndarray


def along_last(vector: jax.Array, like: AnyArray) -> jax.Array:
    """A vector [E] as [1, …, 1, E], to be added to or multiplied with `like` [..., E]."""
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
