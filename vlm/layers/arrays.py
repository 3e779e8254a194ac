"""What public functions take as an array: jax's own, traced or not, or NumPy's (they return jax's). Small helpers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

AnyArray = jax.Array | np.ndarray


def exact(*arrays: AnyArray) -> jax.lax.Precision | None:
    """The precision of a product of `arrays`: float32 is multiplied in float32, half precision as the device likes.

    Left to themselves, TPUs multiply float32 in one bfloat16 pass and NVIDIA GPUs in TF32: errors of 1e-3 and more.
    """
    return jax.lax.Precision.HIGHEST if all(array.dtype == np.float32 for array in arrays) else None


def on_one_cpu() -> bool:
    """Whether the program that is traced is for one CPU, where loops over examples that fit its cache pay."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def along_last(vector: jax.Array, like: AnyArray) -> jax.Array:
    """A vector [E] as [1, …, 1, E], to be added to or multiplied with `like` [..., E]."""
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))
