"""Drawing tokens: temperature, top-k and top-p in this order, then one draw per row from its own key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm.generation.config import GenerationConfig
from vlm.generation.processors import NEVER, Numbers
from vlm.layers.arrays import AnyArray


def warp(scores: Float[AnyArray, "r v"], config: GenerationConfig, n: Numbers, *, keep: int = 1) -> Float[Array, "r v"]:
    """The distribution to draw from, as scores; tokens outside it are −∞.

    Args:
      keep: leave at least so many tokens.
    """
    scores = jnp.asarray(scores)
    if n.temperature is not None:
        scores = scores / n.temperature
    if config.top_k is not None:
        scores = jnp.where(scores < _kth(scores, max(config.top_k, keep)), NEVER, scores)
    if n.top_p is not None:
        smallest = jnp.minimum(nucleus_threshold(scores, n.top_p), _kth(scores, keep))
        scores = jnp.where(scores < smallest, NEVER, scores)
    return scores


def _kth(scores: Float[Array, "r v"], k: int) -> Float[Array, "r 1"]:
    return jax.lax.top_k(scores, min(k, scores.shape[1]))[0][:, -1:]


def nucleus_threshold(scores: Float[Array, "r v"], top_p: jax.Array) -> Float[Array, "r 1"]:
    """The smallest score in the smallest set of tokens whose probability reaches `top_p`.

    A token belongs to it if it and all less probable ones together have more than 1 − top_p. Instead of sorting the
    vocabulary, this bisects on the bits of the probabilities (positive floats are ordered like their bits): exact after
    31 halvings. Equally probable tokens are kept or dropped together.
    """
    probabilities = jax.nn.softmax(scores, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def tail(limit: jax.Array) -> jax.Array:
        return jnp.where(bits <= limit, probabilities, 0).sum(-1, keepdims=True)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # tail(low) is too small, tail(high) is enough
        middle = low + (high - low) // 2
        enough = tail(middle) > 1 - top_p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.full((len(scores), 1), -1, jnp.int32)
    _, high = jax.lax.fori_loop(0, 31, halve, (low, bits.max(-1, keepdims=True)))
    return jnp.where(bits >= high, scores, jnp.inf).min(-1, keepdims=True)


def row_keys(keys: jax.Array, rows: int, step: jax.Array) -> jax.Array:
    """Keys [B, n] of one step from keys [B] of the examples: a row's draws depend on nothing else in the batch."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, step)))(fold(keys, jnp.arange(rows)))


def draw(keys: jax.Array, scores: Float[Array, "b n v"]) -> Int[Array, "b n"]:
    """One token per row, with probabilities softmax(scores)."""
    return jax.vmap(jax.vmap(jax.random.categorical))(keys, scores).astype(jnp.int32)


def draw_without_replacement(keys: jax.Array, scores: Float[Array, "b v"], count: int) -> Int[Array, "b c"]:
    """`count` different tokens per example in the order drawn: the largest scores after adding Gumbel noise."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
    return jax.lax.top_k(scores + noise, count)[1]
