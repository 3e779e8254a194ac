"""Positions: learned tables and their resizing, RoBERTa's padding-aware ids, rotary embedding."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm.layers.arrays import AnyArray


def bicubic_weights(num_in: int, num_out: int) -> Float[np.ndarray, "o i"]:
    """Weights of one axis of PyTorch's bicubic resize (Keys' kernel with a = −0.75, half-pixel centres, clamped edges,
    no antialiasing). `jax.image.resize(method="cubic")` uses a = −0.5 and antialiasing: another function.

    Output pixel o sits at c = (o + ½)·in/out − ½ and mixes the four inputs around it; taps outside are clamped.
    """
    a = -0.75
    centre = (np.arange(num_out) + 0.5) * (num_in / num_out) - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((num_out, num_in))
    for tap in range(4):
        index = first + tap
        d = np.abs(centre - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        np.add.at(weights, (np.arange(num_out), index.clip(0, num_in - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def resize_positions(
    table: Float[AnyArray, "p e"], grid: tuple[int, int], *, num_prefix: int = 1
) -> Float[Array, "q e"]:
    """Resizes a table of patch positions to another grid of (rows, columns), exactly like PyTorch's bicubic.

    The first `num_prefix` rows (class token) are kept. The stored grid must be square.

    Raises:
      ValueError: the table does not hold a square grid.
    """
    table = jnp.asarray(table)
    prefix, patches = table[:num_prefix], table[num_prefix:]
    side = math.isqrt(patches.shape[0])
    if side * side != patches.shape[0]:
        raise ValueError(f"position table: expected a square grid of patches, found {patches.shape[0]} rows")
    if grid == (side, side):
        return table
    rows, columns = (jnp.asarray(bicubic_weights(side, n), patches.dtype) for n in grid)
    square = patches.reshape(side, side, -1)
    resized = jnp.einsum("rs,cd,sde->rce", rows, columns, square, precision="highest")
    return jnp.concatenate([prefix, resized.reshape(grid[0] * grid[1], -1)])


def roberta_positions(tokens: Int[AnyArray, "b l"], pad_id: int) -> Int[Array, "b l"]:
    """RoBERTa's position ids: real tokens count from pad_id + 1, padding gets pad_id; works for left padding too.

    Example with pad_id 1: tokens [0, 11, 2, 1, 1] have positions [2, 3, 4, 1, 1].
    """
    real = (tokens != pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + pad_id


def padded_positions(mask: Bool[AnyArray, "b l"]) -> Int[Array, "b l"]:
    """Positions that count real tokens only, so that a left-padded row equals the same row without padding."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def rotary_tables(
    positions: Int[AnyArray, "b l"], head_dim: int, *, theta: float = 10_000.0
) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
    """Cosine and sine tables of rotary position embedding (Su et al. 2021), half-split layout, float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(
    x: Float[AnyArray, "b l h d"], tables: tuple[Float[Array, "b l d"], Float[Array, "b l d"]]
) -> Float[Array, "b l h d"]:
    """Rotates each pair (x[i], x[i + D/2]) of every head by its position's angle."""
    x = jnp.asarray(x)
    cos, sin = (t[:, :, None, :].astype(x.dtype) for t in tables)
    left, right = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-right, left], axis=-1) * sin
