"""Cache: the keys and values an attention layer has already computed, as an explicit value.

A growing cache (self-attention) has a static buffer of `max_length` slots and one write position for the whole batch;
a constant cache (cross-attention) is simply the projected keys and values, computed once.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Cache:
    """Keys and values [B, M, K, D] of one layer (or [layers, B, M, K, D] of a stack) and the next free slot."""

    key: jax.Array
    value: jax.Array
    index: jax.Array  # int32[] (or [layers])

    @classmethod
    def empty(
        cls,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_layers: int | None = None,
        dtype: Any = jnp.float32,
    ) -> Cache:
        """An empty buffer; with `num_layers` one for each layer of a stack, stacked on the leading axis."""
        lead = () if num_layers is None else (num_layers,)
        shape = (*lead, batch, max_length, num_kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(lead, jnp.int32))

    @property
    def max_length(self) -> int:
        """Number of slots."""
        return self.key.shape[-3]

    def append(self, key: Float[Array, "b l k d"], value: Float[Array, "b l k d"]) -> Cache:
        """Writes `L` new positions at the next free slots. The caller keeps index + L ≤ max_length."""
        start = (0, self.index, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), start),
            self.index + key.shape[1],
        )

    def slots(self, length: int, batch: int) -> Int[Array, "b l"]:
        """Slot numbers that the next `length` positions will take (see `masks.cached_mask`)."""
        return jnp.broadcast_to(self.index + jnp.arange(length), (batch, length))
