"""What may come next: pure functions from scores [R, V] of the next token to scores, given what each row has so far.

A `History` holds the rows right-aligned at the prompt: column L - 1 is every row's last prompt token, column L + t the
token of step t, so that all rows write the same column and n-grams run from prompt to continuation.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm.generation.config import GenerationConfig
from vlm.layers.arrays import AnyArray

NEVER = -jnp.inf


@flax.struct.dataclass
class History:
    """Tokens int32[R, T]; of row r the columns first[r] … stop - 1 are written."""

    tokens: jax.Array
    first: jax.Array  # int32[R]
    stop: jax.Array  # int32[]

    @property
    def written(self) -> Bool[Array, "r t"]:
        """True where a token stands."""
        columns = jnp.arange(self.tokens.shape[1])[None]
        return (columns >= self.first[:, None]) & (columns < self.stop)


@flax.struct.dataclass
class Numbers:
    """The settings that are numbers, traced: None is off, any other value costs no new compilation."""

    repetition_penalty: jax.Array | None
    min_length: jax.Array | None
    min_new_tokens: jax.Array | None
    temperature: jax.Array | None
    top_p: jax.Array | None
    divisors: jax.Array  # float32[longest + 1]: length ** length_penalty
    stop_ids: jax.Array  # int32[S]


def numbers(config: GenerationConfig, stop_ids: tuple[int, ...], longest: int) -> Numbers:
    """The traced part of a config, for sequences of at most `longest` tokens."""

    def number(value: float | None, off: float | None, dtype: type) -> jax.Array | None:
        return None if value == off or value is None else jnp.asarray(value, dtype)

    return Numbers(
        number(config.repetition_penalty, 1.0, jnp.float32),
        number(config.min_length, 0, jnp.int32),
        number(config.min_new_tokens, 0, jnp.int32),
        number(config.temperature, 1.0, jnp.float32),
        number(config.top_p, 1.0, jnp.float32),
        jnp.asarray(np.arange(longest + 1).clip(1).astype(np.float64) ** config.length_penalty, jnp.float32),
        jnp.asarray(stop_ids, jnp.int32),
    )


def process(
    scores: Float[AnyArray, "r v"],
    history: History,
    prompt_length: Int[Array, " r"],
    config: GenerationConfig,
    n: Numbers,
) -> Float[Array, "r v"]:
    """Applies what the config asks for, in the published order; scores are logits or log-probabilities."""
    scores = jnp.asarray(scores)
    if n.repetition_penalty is not None:
        scores = penalise_repetition(scores, history, n.repetition_penalty)
    if config.no_repeat_ngram_size:
        scores = ban(scores, *repeated_ngrams(history, config.no_repeat_ngram_size))
    if config.bad_words_ids:
        scores = ban_words(scores, history, config.bad_words_ids)
    length = history.stop - history.first
    if n.min_length is not None:
        scores = ban_ids(scores, n.stop_ids, length < n.min_length)
    if n.min_new_tokens is not None:
        scores = ban_ids(scores, n.stop_ids, length - prompt_length < n.min_new_tokens)
    return scores


def ban(scores: Float[Array, "r v"], tokens: Int[Array, "r w"], banned: Bool[Array, "r _"]) -> Float[Array, "r v"]:
    """Forbids tokens[r, w] to row r where `banned`."""
    rows = jnp.arange(len(scores))[:, None]
    return scores.at[rows, jnp.where(banned, tokens, scores.shape[1])].set(NEVER, mode="drop")


def ban_ids(scores: Float[Array, "r v"], ids: Int[Array, " s"], rows: Bool[Array, " r"]) -> Float[Array, "r v"]:
    """Forbids `ids` to the chosen rows."""
    return ban(scores, jnp.broadcast_to(ids[None], (len(scores), len(ids))), rows[:, None])


def penalise_repetition(scores: Float[Array, "r v"], history: History, penalty: jax.Array) -> Float[Array, "r v"]:
    """Divides the positive and multiplies the negative scores of tokens that the row has."""
    rows = jnp.arange(len(scores))[:, None]
    columns = jnp.where(history.written, history.tokens, scores.shape[1])
    seen = jnp.zeros(scores.shape, bool).at[rows, columns].set(True, mode="drop")
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def repeated_ngrams(history: History, size: int) -> tuple[Int[Array, "r w"], Bool[Array, "r w"]]:
    """Last tokens of all n-grams so far, and which of them would now repeat one."""
    width = history.tokens.shape[1] - size + 1
    if width < 1:
        return history.tokens[:, :0], history.tokens[:, :0] > 0
    suffix = _last(history, size - 1)
    last = jnp.arange(width)[None] + size - 1
    repeats = (last - size + 1 >= history.first[:, None]) & (last < history.stop)
    for i in range(size - 1):
        repeats &= history.tokens[:, i : i + width] == suffix[:, i : i + 1]
    return history.tokens[:, size - 1 :], repeats


def ban_words(scores: Float[Array, "r v"], history: History, words: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Forbids each word's last token to rows that end in what comes before it."""
    for word in words:
        *start, last = word
        ends = history.stop - history.first >= len(start)
        if start and len(start) > history.tokens.shape[1]:
            continue
        if start:
            ends &= (_last(history, len(start)) == jnp.asarray(start, jnp.int32)[None]).all(1)
        scores = ban_ids(scores, jnp.asarray([last], jnp.int32), ends)
    return scores


def _last(history: History, count: int) -> Int[Array, "r c"]:
    """The last `count` columns written; the caller checks that the row has so many."""
    start = jnp.maximum(history.stop - count, 0)
    return jax.lax.dynamic_slice_in_dim(history.tokens, start, count, axis=1)
