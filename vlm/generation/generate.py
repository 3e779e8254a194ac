"""The door to generation: a model, its parameters and a batch in, token sequences out.

Three compiled programs: the layout of the parameters (once), the prompt (`prefill`), and one loop over the tokens. They
are compiled again for another batch size, number of beams or limit; prompts of any length within a bucket and other
values of a setting that is a number share one program.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vlm.errors import UserError, did_you_mean
from vlm.family import Generative
from vlm.generation.beams import generate_beams
from vlm.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from vlm.generation.processors import Numbers, numbers
from vlm.generation.rows import Prompt, Sequences, generate_rows
from vlm.layers.layout import decoding_layout
from vlm.strict import build


@flax.struct.dataclass
class Prepared:
    """Parameters laid out for decoding; pass them to `generate` in place of the parameters, any number of times."""

    params: Any


@dataclasses.dataclass(frozen=True)
class Generation:
    """Results as NumPy arrays; with n results per example, R = B · n rows, those of example b from b · n.

    Attributes:
      sequences: int32[R, T], prompt without its padding, generated tokens, stop token, then padding.
      lengths: int32[R], tokens of each row, the stop token included; prompt_lengths: int32[R] of them are the prompt.
      scores: float32[R]; of beams the normalised score, otherwise the sum of the model's log-probabilities.
      log_probs: float32[R, N] on request: the model's log-probability of each generated token, 0 after the end.
      completions: the generated tokens of each row, without prompt and stop token.
    """

    sequences: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    scores: np.ndarray
    log_probs: np.ndarray | None
    completions: list[np.ndarray]


def prepare(model: Any, params: Mapping[str, Any]) -> Prepared:
    """Lays parameters out for decoding, once for many calls of `generate`; costs a copy of the decoder.

    Raises:
      UserError: a model that does not generate.
    """
    _check_generative(model)
    parts = tuple(sorted(model.decoding_parts.items()))
    return Prepared(_lay_out(params, parts))


def generate(
    model: Any,
    params: Mapping[str, Any] | Prepared,
    batch: Mapping[str, Any],
    *,
    config: GenerationConfig | None = None,
    rng: jax.Array | None = None,
    prefill_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Generation:
    """Continues the prompts of a batch.

    Args:
      model: of a family that generates; params: its parameters, or what `prepare` made of them.
      batch: as the model's processor makes it; rows may differ in length and be padded on either side. Pixels may lie
        on devices already, split over the rows; everything else is whole on every host.
      config, settings: a `GenerationConfig`, or fields of one; fields given beside a config replace its own.
      rng: a key, or one key for each row, in place of the config's seed.
      prefill_options: static arguments for the model's `prefill` (`interpolate_positions=True`).

    Raises:
      UserError: an unknown or impossible setting, a prompt that leaves no room, a token id outside the vocabulary,
        arrays that do not fit one another or the model (images of another size), scores that are no numbers.
    """
    _check_generative(model)
    base = {} if config is None else {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    config = build(GenerationConfig, base | settings, "generation")
    prepared = params if isinstance(params, Prepared) else prepare(model, params)
    arrays = {name: _held(value) for name, value in model.prompt(batch).items() if value is not None}
    stop_ids = model.stop_ids if config.stop_ids is None else config.stop_ids
    _check_arrays(model, arrays)
    if rng is not None and not config.do_sample:
        raise UserError("rng: only draws use it; expected do_sample=True")
    prompt, steps = _plan(model, arrays, config, stop_ids)
    decoder = model.clone(decoding=True)
    padded = {name: _bucketed(x, model.context_length) for name, x in arrays.items()}
    logits, cache = _prefill(decoder, prepared.params, padded, dict(prefill_options or {}))
    longest = prompt.tokens.shape[1] + steps
    keys = _keys(config, rng, len(logits)) if config.do_sample else None
    traced, static = numbers(config, stop_ids, longest), _static(config)
    out = continue_prompts(decoder, prepared.params, logits, cache, prompt, traced, keys, static, steps)
    return _assemble(prompt, jax.device_get(out), stop_ids, model.pad_id)


@partial(jax.jit, static_argnames=("parts",))
def _lay_out(params: Any, parts: tuple[tuple[str, int], ...]) -> Any:
    return decoding_layout(params, dict(parts))


@partial(jax.jit, static_argnames=("model", "options"))
def prefill(model: Any, params: Any, batch: dict[str, jax.Array], options: tuple[tuple[str, Any], ...] = ()) -> Any:
    """The compiled `model.prefill`: logits [B, V] and cache."""
    return model.apply({"params": params}, **batch, **dict(options), method="prefill")


def _prefill(decoder: Any, params: Any, batch: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """`prefill`, and in plain words what the model refuses."""
    known = [p.name for p in inspect.signature(type(decoder).prefill).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            choices = did_you_mean(name, known) or "; it takes none"
            raise UserError(f"prefill_options: {type(decoder).__name__} has no option {name!r}{choices}")
    try:
        return prefill(decoder, params, batch, tuple(sorted(options.items())))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{name} {tuple(np.shape(x))}" for name, x in batch.items())
        raise UserError(f"batch: the model cannot read {shapes}: {' '.join(str(error).split())}") from error


@partial(jax.jit, static_argnames=("model", "config", "steps"))
def continue_prompts(
    model: Any,
    params: Any,
    logits: jax.Array,
    cache: Any,
    prompt: Prompt,
    traced: Numbers,
    keys: jax.Array | None,
    config: GenerationConfig,
    steps: int,
) -> Sequences:
    """The compiled loop, from the logits and the cache of the prompt."""

    def decode(tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return model.apply({"params": params}, tokens, cache, method="decode")

    run = generate_beams if config.num_beams > 1 else generate_rows
    out = run(decode, logits, cache, prompt, config, traced, keys, steps, model.pad_id)
    if jax.sharding.get_abstract_mesh().empty:
        return out
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), out)


def bucket(length: int) -> int:
    """The length that arrays of this length are padded to: a power of two up to 64, then a multiple of 64."""
    return 1 << (length - 1).bit_length() if length <= 64 else -(-length // 64) * 64


def _held(value: Any) -> Any:
    """Numbers that are looked at here are fetched; pixels stay on the devices, and hosts, that hold them."""
    on_devices = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    return value if on_devices else np.asarray(value)


def _bucketed(x: np.ndarray, longest: int | None) -> np.ndarray:
    """Padded to a bucket, but not beyond the longest sequence that the model has positions for."""
    if x.ndim < 2 or x.dtype.kind not in "iub":
        return x
    length = x.shape[1]
    width = bucket(length) if longest is None else max(length, min(bucket(length), longest))
    return np.pad(x, [(0, 0), (0, width - length), *[(0, 0)] * (x.ndim - 2)])


def _static(config: GenerationConfig) -> GenerationConfig:
    """The part of a config that shapes the program; numbers, which are traced, at fixed values."""
    fixed = {"max_new_tokens": None, "max_length": None, "min_new_tokens": 0, "min_length": 0, "temperature": 1.0}
    fixed |= {"top_p": None, "repetition_penalty": 1.0, "stop_ids": None, "seed": 0}
    return dataclasses.replace(config, **fixed, length_penalty=float(config.length_penalty > 0))


def _check_generative(model: Any) -> None:
    if not all(hasattr(model, name) for name in ("prompt", "prefill", "decode", "decoding_parts")):
        raise UserError(f"{type(model).__name__} does not generate text")
    if not model.decoding_parts:
        raise UserError(f"{type(model).__name__}: this model has no decoder, it does not generate text")


def _plan(
    model: Generative, arrays: Mapping[str, np.ndarray], config: GenerationConfig, stop_ids: tuple[int, ...]
) -> tuple[Prompt, int]:
    """The prompts, right-aligned, with each row's limit; and the most steps that any row takes (bucketed)."""
    tokens, mask = arrays["tokens"], arrays["mask"].astype(bool)
    _check_ids(model, {"stop_ids": stop_ids, "bad_words_ids": sum(config.bad_words_ids, ())})
    if any((stop,) in config.bad_words_ids for stop in stop_ids):
        raise UserError("bad_words_ids: a stop token cannot be forbidden; set min_new_tokens or stop_ids")
    length = mask.sum(1)
    if not length.all():
        raise UserError(f"tokens: expected at least one token in every row, found none in row {int(length.argmin())}")
    if config.max_length is None:
        steps = config.max_new_tokens or DEFAULT_NEW_TOKENS
        limit = np.full(len(length), steps)
    else:
        limit = config.max_length - length
        if limit.min() < 1:
            found = f"prompt of {int(length.max())} tokens in row {int(limit.argmin())}"
            raise UserError(
                f"max_length: expected more than the longest prompt, found {config.max_length} and a {found}"
            )
        steps = bucket(int(limit.max()))
    longest = int((length + limit).max())
    if model.context_length is not None and longest > model.context_length:
        raise UserError(f"the model reads at most {model.context_length} tokens; asked for {longest} with the prompt")
    width = bucket(tokens.shape[1])
    aligned = np.zeros((len(tokens), width), np.int32)
    for row, (ids, real) in enumerate(zip(tokens, mask, strict=True)):
        aligned[row, width - length[row] :] = ids[real]
    return Prompt(aligned, length.astype(np.int32), limit.astype(np.int32)), steps  # pyright: ignore[reportArgumentType]


def _check_arrays(model: Generative, arrays: Mapping[str, Any]) -> None:
    """Rows of one number, masks of their tokens' shape, ids of the vocabulary, those of padding too."""
    rows = {name: len(x) if np.ndim(x) else 0 for name, x in arrays.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        found = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise UserError(f"batch: expected at least one row, and as many of everything, found {found}")
    for name, x in arrays.items():
        mask = arrays.get("mask" if name == "tokens" else f"{name}_mask")
        if mask is not None and (x.shape != mask.shape or x.ndim != 2):
            raise UserError(f"{name}: expected [B, L] with a mask of this shape, found {x.shape} and {mask.shape}")
    _check_ids(model, {name: x for name, x in arrays.items() if x.dtype.kind in "iu"})


def _check_ids(model: Generative, named: Mapping[str, Any]) -> None:
    for name, ids in named.items():
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < model.vocab_size:
            found = int(ids.min() if ids.min() < 0 else ids.max())
            raise UserError(f"{name}: expected ids from 0 to {model.vocab_size - 1}, found {found}")


def _keys(config: GenerationConfig, rng: jax.Array | None, batch: int) -> jax.Array:
    if rng is None:
        rng = jax.random.key(config.seed)
    if not jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (batch,)):
        raise UserError(f"rng: expected a key of jax.random.key, or one for each of {batch} rows, found {rng}")
    return rng if rng.shape else jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))


def _assemble(prompt: Prompt, out: Sequences, stop_ids: tuple[int, ...], pad_id: int) -> Generation:
    """Prompt and generated tokens of each row, left-aligned."""
    count = out.tokens.shape[1]
    starts = np.repeat(np.asarray(prompt.length), count)
    added = np.asarray(out.lengths).reshape(-1)
    tokens, width = np.asarray(out.tokens).reshape(len(added), -1), np.asarray(prompt.tokens).shape[1]
    sequences = np.full((len(added), int((starts + added).max())), pad_id, np.int32)
    completions = []
    for row, (start, more) in enumerate(zip(starts, added, strict=True)):
        new = tokens[row, :more]
        sequences[row, :start] = np.asarray(prompt.tokens)[row // count, width - start :]
        sequences[row, start : start + more] = new
        completions.append(new[:-1] if more and new[-1] in stop_ids else new)
    log_probs = None
    if out.log_probs is not None:
        log_probs = np.array(out.log_probs).reshape(len(added), -1)[:, : added.max()]
        log_probs[np.arange(log_probs.shape[1])[None] >= added[:, None]] = 0
    scores = np.asarray(out.scores).reshape(-1)
    if np.isnan(scores).any():
        raise UserError("scores are not finite: has training diverged?")
    return Generation(sequences, starts + added, starts, scores, log_probs, completions)
