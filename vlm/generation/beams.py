"""Beam search in its two published forms, and beam-sample; one compiled loop, examples independent of each other.

Common to both: one beam is live at first; each step ranks the continuations of all live beams by summed log-
probability, keeps the best that have not ended as live beams, and pools those that ended among the best num_beams. With
s generated tokens (stop token included) after a prompt of p:

=========================  ==========================================  ============================================
form                       hf                                          legacy
=========================  ==========================================  ============================================
score of a pooled one      sum / s^a                                   sum / (p + s − 1)^a, the stop token left out
reaching the limit         ends like a stop token                      the live beams join the pool: sum / (p + s)^a
an example is done when    the best live sum / s^a does not beat the   the pool is full and its worst score is not
                           worst of a full pool                        below the best continuation's sum / (p + s − 1)^a
early_stopping             done when the pool is full                  done when the pool is full
=========================  ==========================================  ============================================

a is `length_penalty`. An example that is done does not change any more, whatever the others do.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.generation.config import GenerationConfig
from vlm.generation.processors import Numbers, process
from vlm.generation.rows import Decode, Prompt, Sequences, column, history, write
from vlm.generation.sampling import draw_without_replacement, warp
from vlm.layers.cache import DecoderCache

LOWEST = -1.0e9


@flax.struct.dataclass
class _State:
    """Live beams, their summed log-probabilities [B, n]; the pool of ended ones, best first."""

    live: Sequences
    pool: Sequences
    ended: Bool[Array, "b n"]
    done: Bool[Array, " b"]
    step: jax.Array


@flax.struct.dataclass
class _Candidates:
    """The best continuations [B, c] of an example, best first (in the order drawn when sampling in the hf form)."""

    sequences: Sequences
    beam: Int[Array, "b c"]
    stops: Bool[Array, "b c"]

    @property
    def sums(self) -> Float[Array, "b c"]:
        return self.sequences.scores


def generate_beams(
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
    """The num_return_sequences best of each example, best first; arguments as for `rows.generate_rows`."""
    batch, beams = len(logits), config.num_beams
    update = _update_legacy if config.beam_normalisation == "legacy" else _update_hf

    def advance(state: _State, logits: Float[Array, "b n v"]) -> tuple[_State, Int[Array, "b n"]]:
        candidates = _continue(state, logits, prompt, config, n, keys)
        following, chosen = update(state, candidates, prompt, config, n)
        pool, ended = _where(state.done, (state.pool, state.ended), (following.pool, following.ended))
        done = state.done | following.done
        following = _State(following.live, pool, ended, done, state.step + 1)
        return following, jnp.take_along_axis(candidates.beam, chosen, axis=1)

    def body(carry: tuple[_State, DecoderCache]) -> tuple[_State, DecoderCache]:
        state, cache = carry
        logits, cache = decode(column(state.live.tokens, state.step - 1), cache)
        state, parents = advance(state, logits)
        return state, cache.select(parents)

    repeated = jnp.broadcast_to(logits[:, None], (batch, beams, logits.shape[1]))
    first, _ = advance(_start(batch, beams, steps, pad_id, config), repeated)
    more = lambda carry: ~carry[0].done.all() & (carry[0].step < steps)  # noqa: E731
    pool = jax.lax.while_loop(more, body, (first, cache.reserve(steps, beams)))[0].pool
    return jax.tree.map(lambda x: x[:, : config.num_return_sequences], pool)


def _start(batch: int, beams: int, steps: int, pad_id: int, config: GenerationConfig) -> _State:
    def empty(scores: jax.Array) -> Sequences:
        log_probs = jnp.zeros((batch, beams, steps)) if config.log_probs else None
        tokens = jnp.full((batch, beams, steps), pad_id, jnp.int32)
        return Sequences(tokens, jnp.zeros((batch, beams), jnp.int32), scores, log_probs)

    one = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, LOWEST)[None], (batch, beams))
    never = jnp.zeros((batch, beams), bool)
    return _State(
        empty(one), empty(jnp.full((batch, beams), LOWEST)), never, jnp.zeros(batch, bool), jnp.zeros((), jnp.int32)
    )


def _continue(
    state: _State,
    logits: Float[Array, "b n v"],
    prompt: Prompt,
    config: GenerationConfig,
    n: Numbers,
    keys: jax.Array | None,
) -> _Candidates:
    """Ranks all continuations; enough of them that num_beams are left when the others have ended."""
    batch, beams, vocab = logits.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    scores = process(log_probs.reshape(-1, vocab), *history(prompt, state.live.tokens, state.step), config, n)
    if config.do_sample:
        scores = warp(scores, config, n, keep=len(n.stop_ids) + 1)
    sums = (scores.reshape(batch, beams, vocab) + state.live.scores[..., None]).reshape(batch, -1)
    count = min(max(2, 1 + len(n.stop_ids)) * beams, beams * vocab)
    if config.do_sample:
        assert keys is not None
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(keys)
        index = draw_without_replacement(step_keys, sums, count)
        values = jnp.take_along_axis(sums, index, axis=1)
        if config.beam_normalisation == "legacy":
            values, order = jax.lax.top_k(values, count)
            index = jnp.take_along_axis(index, order, axis=1)
    else:
        values, index = jax.lax.top_k(sums, count)
    beam, tokens = index // vocab, (index % vocab).astype(jnp.int32)
    grown = _pick(state.live, beam)
    chosen = jnp.take_along_axis(log_probs.reshape(batch, -1), index, axis=1)
    sequences = Sequences(
        write(grown.tokens, tokens, state.step),
        jnp.full_like(grown.lengths, 1) + state.step,
        values,
        None if grown.log_probs is None else write(grown.log_probs, chosen, state.step),
    )
    return _Candidates(sequences, beam, jnp.isin(tokens, n.stop_ids))


def _update_hf(
    state: _State, candidates: _Candidates, prompt: Prompt, config: GenerationConfig, n: Numbers
) -> tuple[_State, Int[Array, "b n"]]:
    beams, generated = config.num_beams, state.step + 1
    ends = candidates.stops | (generated >= prompt.limit)[:, None]
    sums, chosen = jax.lax.top_k(candidates.sums + jnp.where(ends, LOWEST, 0.0), beams)
    live = _pick(candidates.sequences, chosen).replace(scores=sums)  # pyright: ignore[reportAttributeAccessIssue]

    pooled = ends & (jnp.arange(ends.shape[1]) < beams)[None]
    scores = candidates.sums / n.divisors[generated] + jnp.where(pooled, 0.0, LOWEST)
    pool, ended = _merge(state, candidates.sequences, scores, pooled, beams)

    optimistic = config.early_stopping == "never" and config.length_penalty > 0
    divisor = n.divisors[prompt.limit if optimistic else jnp.broadcast_to(generated, prompt.limit.shape)]
    worst = jnp.where(ended, pool.scores.min(1, keepdims=True), LOWEST)
    improvable = (live.scores[:, :1] / divisor[:, None] > worst).any(1)
    full = ended.all(1) if config.early_stopping is True else jnp.zeros(len(ended), bool)
    return _State(live, pool, ended, ~improvable | full | ends.all(1), generated), chosen


def _update_legacy(
    state: _State, candidates: _Candidates, prompt: Prompt, config: GenerationConfig, n: Numbers
) -> tuple[_State, Int[Array, "b n"]]:
    beams = config.num_beams
    length = prompt.length + state.step  # before this step's token
    divisor = n.divisors[length][:, None]
    sums, chosen = jax.lax.top_k(jnp.where(candidates.stops, -jnp.inf, candidates.sums), beams)
    live = _pick(candidates.sequences, chosen).replace(scores=sums)  # pyright: ignore[reportAttributeAccessIssue]

    pooled = candidates.stops & (jnp.arange(candidates.stops.shape[1]) < beams)[None]
    scores = jnp.where(pooled, candidates.sums / divisor, LOWEST)
    pool, ended = _merge(state, candidates.sequences, scores, pooled, beams)
    hopeless = pool.scores.min(1) >= candidates.sums.max(1) / divisor[:, 0]
    done = ended.all(1) & (True if config.early_stopping is True else hopeless)

    last = (state.step + 1 >= prompt.limit) & ~done
    scores = jnp.where(last[:, None], live.scores / n.divisors[length + 1][:, None], LOWEST)
    following = _State(live, pool, ended, done, state.step + 1)
    closed = _merge(following, live, scores, jnp.broadcast_to(last[:, None], scores.shape), beams)
    pool, ended = _where(last, closed, (pool, ended))
    return _State(live, pool, ended, done | last, state.step + 1), chosen


def _merge(
    state: _State, new: Sequences, scores: Float[Array, "b c"], pooled: Bool[Array, "b c"], beams: int
) -> tuple[Sequences, Bool[Array, "b n"]]:
    """The best of the pool and the new sequences; the older one where scores are equal."""
    new = new.replace(scores=scores)  # pyright: ignore[reportAttributeAccessIssue]
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.pool, new)
    best = jax.lax.top_k(both.scores, beams)[1]
    ended = jnp.take_along_axis(jnp.concatenate([state.ended, pooled], axis=1), best, axis=1)
    return _pick(both, best), ended


def _pick(sequences: Sequences, index: Int[Array, "b c"]) -> Sequences:
    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, sequences)


def _where(rows: Bool[Array, " b"], first: tuple[Sequences, Array], second: tuple[Sequences, Array]):
    """`first` for the chosen examples, `second` for the others."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b), first, second)
