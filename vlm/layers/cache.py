"""Cache: the keys and values that attention layers have already computed, as an explicit value.

Decoding keeps the rows of one example (beams, samples) together: they are the query axis. What all rows of an example
share, the prompt and whatever cross-attention reads, is stored once per example and never repeated. The tokens that the
rows have written since share one buffer too; each row remembers whose tokens are its own (`DecoderCache.origin`), so
that choosing other beams moves a small table of integers and no keys and values.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.layers.arrays import AnyArray


@flax.struct.dataclass
class Cache:
    """Keys and values [B, K, M, D] of one layer, heads before slots, as the products of attention read them.

    With an `index`, the next free slot int32[], the cache grows inside its static buffer; without one it is constant
    (cross-attention).
    """

    key: jax.Array
    value: jax.Array
    index: jax.Array | None = None

    @classmethod
    def constant(cls, key: Float[Array, "b m k d"], value: Float[Array, "b m k d"]) -> Cache:
        """A cache that does not grow."""
        return cls(key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3))

    @property
    def slots(self) -> int:
        """Number of slots M."""
        return self.key.shape[2]

    def append(self, key: Float[Array, "b l k d"], value: Float[Array, "b l k d"]) -> Cache:
        """Writes `L` new positions at the next free slots. The caller keeps index + L ≤ slots."""
        assert self.index is not None, "a constant cache does not grow"
        start = (0, 0, self.index, 0)
        key, value = (x.transpose(0, 2, 1, 3).astype(self.key.dtype) for x in (key, value))
        return Cache(
            jax.lax.dynamic_update_slice(self.key, key, start),
            jax.lax.dynamic_update_slice(self.value, value, start),
            self.index + key.shape[2],
        )

    def reserve(self, slots: int) -> Cache:
        """A growing cache with `slots` more, free ones after those in use now."""
        grow = ((0, 0), (0, 0), (0, slots), (0, 0))
        return Cache(jnp.pad(self.key, grow), jnp.pad(self.value, grow), jnp.asarray(self.slots, jnp.int32))


@flax.struct.dataclass
class DecoderCache:
    """What a decoder remembers: the caches of its layers and the bookkeeping that all layers share.

    `prefill` makes one with the prompt's slots; `reserve` adds room for what is to be generated: in step t the n rows
    of an example write slots L + t·n … L + t·n + n − 1.

    Attributes:
      layers: self-attention's caches, M = L slots before `reserve`, L + steps·n after it.
      prompt_mask: bool[B, L], true at the prompt's real tokens, wherever the padding is.
      positions: int32[B], the position of the next token.
      constants: what cross-attention reads and anything else [B, …] that a family needs in every step.
      origin: int32[B, n, steps], which of the example's n rows wrote the token that row j has at each step.
      step: int32[], tokens written so far.
    """

    layers: tuple[Cache, ...]
    prompt_mask: jax.Array
    positions: jax.Array
    constants: Any = None
    origin: jax.Array | None = None
    step: jax.Array | None = None

    @classmethod
    def of_prompt(
        cls,
        keys_values: tuple[tuple[Float[Array, "b l k d"], Float[Array, "b l k d"]], ...],
        mask: Bool[AnyArray, "b l"],
        constants: Any = None,
    ) -> DecoderCache:
        """The cache after a prompt, from each layer's keys and values; positions count real tokens from 0."""
        layers = tuple(Cache.constant(*pair) for pair in keys_values)
        mask = jnp.asarray(mask)
        return cls(layers, mask, mask.sum(1, dtype=jnp.int32), constants)

    def reserve(self, steps: int, rows: int) -> DecoderCache:
        """Room for `steps` tokens of `rows` sequences per example."""
        batch = self.prompt_mask.shape[0]
        return self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            layers=tuple(layer.reserve(steps * rows) for layer in self.layers),
            origin=jnp.zeros((batch, rows, steps), jnp.int32),
            step=jnp.zeros((), jnp.int32),
        )

    def begin(self) -> tuple[DecoderCache, Bool[Array, "b 1 n m"], Int[Array, "b n"]]:
        """Starts a step in which every row writes its own next token.

        Returns the cache for the next step (whose `layers` the caller replaces), the mask of this step's queries over
        all slots, and their positions. With two rows, a prompt `p` and row 1 continuing row 0's first token:

        ::

                  p  step 0   step 1
            row 0 1   1 0      1 0
            row 1 1   1 0      0 1
        """
        assert self.origin is not None and self.step is not None, "reserve room for the new tokens first"
        batch, rows, steps = self.origin.shape
        own = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[None, :, None], (batch, rows, 1))
        origin = jax.lax.dynamic_update_slice(self.origin, own, (0, 0, self.step))
        written = (jnp.arange(steps) <= self.step)[None, None, :, None]
        mine = (origin[..., None] == jnp.arange(rows, dtype=jnp.int32)[None, None, None, :]) & written
        prompt = jnp.broadcast_to(self.prompt_mask[:, None, :], (batch, rows, self.prompt_mask.shape[1]))
        mask = jnp.concatenate([prompt, mine.reshape(batch, rows, steps * rows)], axis=-1)
        positions = jnp.broadcast_to(self.positions[:, None], (batch, rows))
        following = self.replace(  # pyright: ignore[reportAttributeAccessIssue]
            origin=origin, step=self.step + 1, positions=self.positions + 1
        )
        return following, mask[:, None], positions

    def select(self, rows: Int[Array, "b n"]) -> DecoderCache:
        """Row j of each example continues what its row `rows[:, j]` has written."""
        assert self.origin is not None
        origin = jnp.take_along_axis(self.origin, rows[:, :, None], axis=1)
        return self.replace(origin=origin)  # pyright: ignore[reportAttributeAccessIssue]
