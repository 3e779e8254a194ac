"""The momentum teacher and its queue (Li et al. 2021, arXiv 2107.07651, section 3.3; BLIP, section 3.2).

The teacher is a moving average of the student. Its features are the targets' source and the candidates of the
contrastive loss: those of the batch, and those of earlier batches from a queue. No device ever holds the whole queue:
queries travel to the queue's rows, and only sums over candidates travel back.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm.errors import UserError
from vlm.family import Batch, Extra, Metrics, Params
from vlm.layers.arrays import exact
from vlm.layers.linear import constrain
from vlm.layers.norms import normalise
from vlm.tree import flatten, unflatten

# ----------------------------------------------------------------------------------------------------------- teacher


def apply(model: Any, params: Params, rng: jax.Array, method: Any, *inputs: Any) -> Any:
    """Runs a method of the model as in training, dropout included."""
    return model.apply({"params": params}, *inputs, deterministic=False, method=method, rngs={"dropout": rng})


def copied(params: Params, pattern: str) -> Params:
    """The parameters whose whole path matches."""
    return unflatten({path: leaf for path, leaf in flatten(params).items() if re.fullmatch(pattern, path)})


def update_teacher(teacher: Params, params: Params, momentum: float) -> Params:
    """`momentum · teacher + (1 − momentum) · student`; no gradient flows through it."""
    student = flatten(jax.lax.stop_gradient(params))
    averages = flatten(teacher)
    return unflatten({path: old + (1.0 - momentum) * (student[path] - old) for path, old in averages.items()})


def with_teacher(teacher: Params, params: Params) -> Params:
    """A whole parameter tree that runs as the teacher: its copies, and the student's where it has none."""
    return unflatten(flatten(jax.lax.stop_gradient(params)) | flatten(teacher))


def alpha(step: Int[Array, ""], highest: float, ramp: int) -> Float[Array, ""]:
    """Weight of the teacher's targets after `step` batches: linear from 0 to `highest` over `ramp` batches."""
    return highest * jnp.minimum(1.0, step.astype(jnp.float32) / max(ramp, 1)) if ramp else jnp.float32(highest)


# ------------------------------------------------------------------------------------------------------------- queue


def enqueue(
    queue: Shaped[Array, "q ..."], rows: Shaped[Array, "b ..."], index: Int[Array, ""]
) -> Shaped[Array, "q ..."]:
    """Writes `rows` over the oldest entries, from `index` on and around the end.

    The few new rows are sent to every device, which picks those that fall on its part of the queue.
    """
    size, count = len(queue), len(rows)
    rest = (None,) * (queue.ndim - 1)
    age = constrain((jnp.arange(size) - index) % size, "batch")
    rows = constrain(rows, None, *rest)
    fresh = jnp.take(rows, jnp.minimum(age, count - 1), axis=0)
    new = jnp.where((age < count).reshape(-1, *(1,) * len(rest)), fresh, queue)
    return constrain(new, "batch", *rest)


def advance(extra: Extra, features: dict[str, jax.Array]) -> Extra:
    """`extra` after a batch: features in their queues, the counters further.

    Raises:
      UserError: the batch is larger than the queue.
    """
    (size,) = {len(extra[name]) for name in features}
    (count,) = {len(rows) for rows in features.values()}
    if count > size:
        raise UserError(f"config.loss.queue_size: expected at least the batch of {count}, found {size}")
    index = extra["queue_index"]
    queues = {name: enqueue(extra[name], jax.lax.stop_gradient(rows), index) for name, rows in features.items()}
    return extra | queues | {"queue_index": (index + count) % size, "step": extra["step"] + 1}


# ----------------------------------------------------------------------------------------------- contrastive loss


def in_groups(x: Shaped[Array, "b ..."], group: int) -> Shaped[Array, "n g ..."]:
    """[B, …] as [B / g, g, …].

    Raises:
      UserError: the batch is not a multiple of the group.
    """
    if group < 2 or len(x) % group:
        raise UserError(f"config.loss.group_size: expected a divisor of the batch of {len(x)} above 1, found {group}")
    return constrain(x.reshape(-1, group, *x.shape[1:]), "batch", *(None,) * x.ndim)


def similarities(query: Float[Array, "b d"], keys: Float[Array, "b d"], group: int) -> Float[Array, "b g"]:
    """Cosines of each row with the rows of its group."""
    cosines = jnp.einsum("ngd,nkd->ngk", in_groups(query, group), in_groups(keys, group), precision=exact(query))
    return cosines.reshape(len(query), group)


def itc(
    query: Float[Array, "b d"],
    teacher_query: Float[Array, "b d"],
    keys: Float[Array, "b d"],
    queue: Float[Array, "q d"],
    temperature: Float[Array, ""],
    weight: Float[Array, ""] | float,
    group: int,
    positives: tuple[Bool[Array, "b g"], Bool[Array, "b q"]] | None = None,
) -> Float[Array, ""]:
    """Contrastive loss of one direction towards soft targets (Li et al. 2021, equation 6).

    With s the cosines of `query` with its candidates over `temperature`, and s' the teacher's, the mean over rows of
    −Σ_j t_j log softmax(s)_j, where t = weight · softmax(s') + (1 − weight) · (uniform over the positives).
    Candidates are the group's rows of `keys`, then the queue. Gradients reach `query` and, through s, `temperature`.

    Args:
      query: the student's features of one modality; teacher_query: the teacher's; all are unit vectors.
      keys, queue: the teacher's features of the other modality.
      positives: which candidates in the batch and in the queue belong to a row; None: its own only.
    """
    teacher_query, keys, queue = jax.lax.stop_gradient((teacher_query, keys, queue))
    fixed = jax.lax.stop_gradient(temperature)
    batch, teacher_batch = (similarities(x, keys, group) / t for x, t in ((query, temperature), (teacher_query, fixed)))
    old, teacher_old = (
        constrain(jnp.einsum("bd,qd->bq", x, queue, precision=exact(x)), None, "batch") / t
        for x, t in ((query, temperature), (teacher_query, fixed))
    )

    def both(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a, axis=-1) + jnp.sum(b, axis=-1)

    def normaliser(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.logaddexp(jax.nn.logsumexp(a, axis=-1), jax.nn.logsumexp(b, axis=-1))

    shift = normaliser(teacher_batch, teacher_old)[:, None]
    soft = both(jnp.exp(teacher_batch - shift) * batch, jnp.exp(teacher_old - shift) * old)
    if positives is None:
        own = jnp.tile(jnp.eye(group, dtype=bool), (len(query) // group, 1))
        hard = jnp.sum(jnp.where(own, batch, 0.0), axis=-1)
    else:
        here, there = positives
        hard = both(jnp.where(here, batch, 0.0), jnp.where(there, old, 0.0)) / both(here, there)
    return jnp.mean(normaliser(batch, old) - weight * soft - (1.0 - weight) * hard)


def contrast(
    model: Any, params: Params, extra: Extra, batch: Batch, seen: Any, rng: jax.Array, config: Any
) -> tuple[jax.Array, dict[str, jax.Array], Metrics, Extra]:
    """The contrastive half of a step, in the published order: student, teacher moved and run, loss, queues.

    Args:
      seen: the student's image states; they are not computed again.

    Returns:
      The loss, the features (`image`, `text`, and the teacher's `image_teacher`, `text_teacher`), terms for the log,
      and the next extra state. With `image_id` in the batch, all features of equal ids are positives.
    """
    text_rng, image_rng, teacher_rng = jax.random.split(rng, 3)
    project = model.apply({"params": params}, seen.pooler_output, method=lambda m, x: m.vision_projection(x))
    inputs = batch["tokens"], batch["mask"]
    found = {"image": project, "text": apply(model, params, text_rng, model.encode_text, *inputs)}

    teacher = update_teacher(extra["teacher"], params, config.momentum)
    whole = with_teacher(teacher, params)
    found["image_teacher"] = apply(model, whole, image_rng, model.encode_image, batch["image"])
    found["text_teacher"] = apply(model, whole, teacher_rng, model.encode_text, *inputs)
    found = {name: normalise(x) for name, x in found.items()}
    found |= {name: jax.lax.stop_gradient(found[name]) for name in ("image_teacher", "text_teacher")}

    group = config.group_size or len(batch["tokens"])
    weight, temperature = alpha(extra["step"], config.alpha, config.alpha_steps), params["temperature"]
    features = {"image_queue": found["image_teacher"], "text_queue": found["text_teacher"]}
    positives = None
    if "id_queue" in extra:
        features["id_queue"] = ids = batch["image_id"].astype(jnp.int32)
        grouped = in_groups(ids, group)
        here = (grouped[:, :, None] == grouped[:, None, :]).reshape(len(ids), group)
        positives = here, constrain(ids[:, None] == extra["id_queue"][None], None, "batch")
    losses = [
        itc(
            found[ours],
            found[f"{ours}_teacher"],
            found[f"{theirs}_teacher"],
            extra[f"{theirs}_queue"],
            temperature,
            weight,
            group,
            positives,
        )
        for ours, theirs in (("image", "text"), ("text", "image"))
    ]
    value = (losses[0] + losses[1]) / 2
    terms = {"itc": value, "temperature": temperature, "alpha": weight}
    return value, found, terms, advance(extra | {"teacher": teacher}, features)
