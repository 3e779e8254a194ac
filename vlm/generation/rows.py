"""The decode loop without beams: every row takes its most probable token, or draws one, until it has ended."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm.generation.config import GenerationConfig
from vlm.generation.processors import History, Numbers, process
from vlm.generation.sampling import draw, row_keys, warp
from vlm.layers.cache import DecoderCache

Decode = Callable[[Int[Array, "b n"], DecoderCache], tuple[Float[Array, "b n v"], DecoderCache]]


@flax.struct.dataclass
class Prompt:
    """Prompts int32[B, L], right-aligned; their lengths int32[B] and how many tokens each row may add, int32[B]."""

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array


@flax.struct.dataclass
class Sequences:
    """What a loop gives: tokens int32[B, n, N] after the prompt, the stop token included; the number of them [B, n];
    a score for each sequence [B, n]; on request the model's log-probability of each token [B, n, N].
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    log_probs: jax.Array | None = None


def history(prompt: Prompt, tokens: Int[Array, "b n t"], step: jax.Array) -> tuple[History, Int[Array, " r"]]:
    """The rows [B · n] as logit processors see them, and the length of each one's prompt."""
    batch, rows, _ = tokens.shape
    width = prompt.tokens.shape[1]
    start = jnp.broadcast_to(prompt.tokens[:, None], (batch, rows, width))
    columns = jnp.concatenate([start, tokens], axis=-1).reshape(batch * rows, -1)
    length = jnp.repeat(prompt.length, rows)
    return History(columns, width - length, width + step), length


def write(buffer: Array, values: Array, step: jax.Array) -> Array:
    """Puts values [B, n] in column `step` of buffer [B, n, N]."""
    return jax.lax.dynamic_update_slice(buffer, values[..., None].astype(buffer.dtype), (0, 0, step))


def column(buffer: Array, step: jax.Array) -> Array:
    """Column `step` of buffer [B, n, N]."""
    return jax.lax.dynamic_index_in_dim(buffer, step, axis=2, keepdims=False)


@flax.struct.dataclass
class _State:
    out: Sequences
    done: jax.Array
    step: jax.Array


def generate_rows(
    decode: Decode,
    logits: Float[Array, "b v"],
    cache: DecoderCache,
    prompt: Prompt,
    config: GenerationConfig,
    n: Numbers,
    keys: jax.Array | None,
    steps: int,
    pad_id: int,
) -> Sequences:
    """Greedy decoding, or samples from keys [B]; scores are sums of the model's log-probabilities.

    Args:
      decode: one step of the model: the last tokens [B, n] and the cache to the next logits and cache.
      logits, cache: after the prompt; steps: most tokens that any row may add.
    """
    batch, rows = len(logits), config.rows

    def choose(state: _State, logits: Float[Array, "b n v"]) -> _State:
        flat = logits.astype(jnp.float32).reshape(batch * rows, -1)
        scores = process(flat, *history(prompt, state.out.tokens, state.step), config, n)
        if config.do_sample:
            assert keys is not None
            scores = warp(scores, config, n).reshape(batch, rows, -1)
            tokens = draw(row_keys(keys, rows, state.step), scores)
        else:
            tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32).reshape(batch, rows)
        chosen = jnp.take_along_axis(flat, tokens.reshape(-1, 1), axis=1)[:, 0] - jax.nn.logsumexp(flat, axis=-1)
        chosen = jnp.where(state.done, 0.0, chosen.reshape(batch, rows))
        tokens, out = jnp.where(state.done, pad_id, tokens), state.out
        lengths = out.lengths + ~state.done
        log_probs = None if out.log_probs is None else write(out.log_probs, chosen, state.step)
        out = Sequences(write(out.tokens, tokens, state.step), lengths, out.scores + chosen, log_probs)
        done = state.done | jnp.isin(tokens, n.stop_ids) | (lengths >= prompt.limit[:, None])
        return _State(out, done, state.step + 1)

    def body(carry: tuple[_State, DecoderCache]) -> tuple[_State, DecoderCache]:
        state, cache = carry
        logits, cache = decode(column(state.out.tokens, state.step - 1), cache)
        return choose(state, logits), cache

    empty = Sequences(
        jnp.full((batch, rows, steps), pad_id, jnp.int32),
        jnp.zeros((batch, rows), jnp.int32),
        jnp.zeros((batch, rows)),
        jnp.zeros((batch, rows, steps)) if config.log_probs else None,
    )
    start = _State(empty, jnp.zeros((batch, rows), bool), jnp.zeros((), jnp.int32))
    first = choose(start, jnp.broadcast_to(logits[:, None], (batch, rows, logits.shape[1])))
    more = lambda carry: ~carry[0].done.all() & (carry[0].step < steps)  # noqa: E731
    return jax.lax.while_loop(more, body, (first, cache.reserve(steps, rows)))[0].out
