"""Objectives as pure functions of arrays: contrastive, regression onto a teacher, cross-entropy.

All reductions are in float32 whatever the inputs' dtype. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int

from vlm.layers.arrays import AnyArray, along_last, exact

RING_FROM = 65_536
"""Global batch size from which `contrastive(form="auto")` streams blocks instead of keeping rows."""

BLOCK_ROWS = 4096
"""Most rows of a block of logits that the ring form holds at once."""

Scalar = Float[Array, ""]
Axes = tuple[str, ...]


def contrastive(
    image_embeds: Float[AnyArray, "b d"],
    text_embeds: Float[AnyArray, "b d"],
    scale: Scalar | float,
    *,
    weights: Float[AnyArray, " b"] | None = None,
    candidate_gradients: bool = True,
    form: Literal["auto", "rows", "ring"] = "auto",
) -> Scalar:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, figure 3).

    With s = scale · image_embeds · text_embedsᵀ: the sum over i of
    weights_i · ((logsumexp_j s_ij + logsumexp_j s_ji) / 2 − s_ii).

    Under a mesh (`jax.set_mesh`) the batch is spread over every mesh axis that divides it, and no device ever holds
    the B × B logits. Value and gradients are those of one device with the whole batch:

      "rows"  a device keeps the logits of its own images against all texts, B²/n numbers; recomputed for the gradient.
      "ring"  texts travel around the devices; a device keeps a block of at most `BLOCK_ROWS` × B/n logits at a time.
      "auto"  rows below a batch of `RING_FROM`, ring from there on.

    Args:
      image_embeds, text_embeds: unit vectors; row i of one belongs to row i of the other.
      scale: inverse temperature, exp(logit_scale).
      weights: share of every pair in the result, a constant; None: 1/B, the mean. A pair of weight 0 asks for nothing
        but is a candidate of the others.
      candidate_gradients: False: an embedding learns from its own row only, not from being a candidate of others (the
        "local" gradients of gathering without them).
      form: how the same number is computed.

    Raises:
      ValueError: called where the mesh axes are already mapped by hand (inside `jax.shard_map`).
    """
    batch = image_embeds.shape[0]
    if form == "auto":
        form = "ring" if batch >= RING_FROM else "rows"
    image_embeds, text_embeds = jnp.asarray(image_embeds), jnp.asarray(text_embeds)
    shares = jnp.full((batch,), 1 / batch, jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    scale = jnp.asarray(scale, jnp.float32)
    how = (form, _batch_axes(batch), candidate_gradients)
    return _contrastive(image_embeds, text_embeds, scale, jax.lax.stop_gradient(shares), how)


def mean_squared_error(prediction: Float[AnyArray, "*b d"], target: Float[AnyArray, "*b d"]) -> Scalar:
    """Mean over batch and dimensions of (prediction − target)², as teacher learning uses it."""
    return jnp.mean(jnp.square(jnp.asarray(prediction, jnp.float32) - jnp.asarray(target, jnp.float32)))


def cross_entropy(
    logits: Float[AnyArray, "*b v"], labels: Int[AnyArray, "*b"], *, label_smoothing: float = 0.0, ignore: int = -100
) -> Scalar:
    """Mean of `token_losses` over the labels that are not `ignore`; 0 where all are."""
    losses = token_losses(logits, labels, label_smoothing=label_smoothing, ignore=ignore)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(labels != ignore), 1)


def token_losses(
    logits: Float[AnyArray, "*b v"], labels: Int[AnyArray, "*b"], *, label_smoothing: float = 0.0, ignore: int = -100
) -> Float[Array, "*b"]:
    """Negative log-likelihood of every label; 0 where the label is `ignore`.

    With label smoothing ε (Szegedy et al. 2016, section 7) the target is 1 − ε on the label plus ε / V everywhere.
    """
    logits, labels = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    keep = labels != ignore
    # Selecting by comparison instead of indexing: with the vocabulary sharded no device gathers the logits.
    classes = along_last(jnp.arange(logits.shape[-1], dtype=labels.dtype), logits)
    chosen = classes == jnp.expand_dims(jnp.where(keep, labels, 0), -1)
    target = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing * jnp.mean(logits, axis=-1)
    return jnp.where(keep, jax.nn.logsumexp(logits, axis=-1) - target, 0.0)


def chunked_cross_entropy(
    hidden: Float[AnyArray, "b e"],
    head: Callable[[Float[Array, "c e"]], Float[Array, "c v"]],
    labels: Int[AnyArray, " b"],
    *,
    chunk: int = 4096,
    ignore: int = -100,
) -> Scalar:
    """`cross_entropy(head(hidden), labels)` where only `chunk` rows of logits exist at a time, also in its gradient.

    Args:
      hidden: one row per token; head: rows of hidden states to rows of logits; chunk: rows per piece.
    """
    length = hidden.shape[0]
    chunk = min(chunk, length)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, chunk, hidden.shape[-1])
    labels = jnp.pad(labels, (0, padding), constant_values=ignore).reshape(-1, chunk)

    @jax.checkpoint
    def piece(rows: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(token_losses(head(rows), targets, ignore=ignore)), jnp.sum(targets != ignore)

    def step(carry: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        total, count = piece(*rows)
        return (carry[0] + total, carry[1] + count), None

    (total, count), _ = jax.lax.scan(step, (jnp.zeros(()), jnp.zeros((), jnp.int32)), (hidden, labels))
    return total / jnp.maximum(count, 1)


# ----------------------------------------------------------------------------------- contrastive: where the rows are


def _batch_axes(batch: int) -> Axes:
    """The mesh axes that the batch is spread over; none without a mesh.

    Embeddings are the same along axes that split weights only (tensor), so those devices can take a share as well.
    """
    mesh = get_abstract_mesh()
    if mesh.empty:
        return ()
    if any(kind == AxisType.Manual for kind in mesh.axis_types):
        raise ValueError("contrastive: expected to be called outside jax.shard_map, found mesh axes mapped by hand")
    axes = tuple(mesh.axis_names)
    while axes and batch % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes if math.prod(mesh.shape[axis] for axis in axes) > 1 else ()


# -------------------------------------------------------------------------------- contrastive: value and gradient
# s = scale · image · textᵀ is computed twice, block by block: once for the normalisers of both softmaxes, which are all
# that the backward pass keeps, and once for the gradient. With the share v of every pair and
# w_ij = (v_i · softmax of row i + v_j · softmax of column j) / 2,
#   d loss / d image_i = scale · (Σ_j w_ij text_j − v_i text_i), likewise for texts, and
#   d loss / d scale   = Σ_i image_i · (Σ_j w_ij text_j − v_i text_i).
# A share is folded into its normaliser: v_i · exp(s_ij − n_i) = exp(s_ij − (n_i − ln v_i)).
# Without the candidates' gradients images get the part of the rows, texts that of the columns, and half of v.

How = tuple[str, Axes, bool]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _contrastive(image: jax.Array, text: jax.Array, scale: jax.Array, shares: jax.Array, how: How) -> jax.Array:
    return _forward(image, text, scale, shares, how)[0]


def _forward(image: jax.Array, text: jax.Array, scale: jax.Array, shares: jax.Array, how: How) -> tuple[jax.Array, Any]:
    form, axes, _ = how
    split, whole = PartitionSpec(axes), PartitionSpec()
    normalisers, _ = _FORMS[form]
    local = _spread(normalisers, axes, (split, split, whole), (split, split))
    per_image, per_text = local(image, text, scale)
    positives = scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)
    value = jnp.sum(shares * ((per_image + per_text) / 2 - positives))
    return value, (image, text, scale, shares, per_image, per_text)


def _backward(how: How, saved: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    form, axes, candidates = how
    split, whole = PartitionSpec(axes), PartitionSpec()
    _, gradients = _FORMS[form]
    image, text, scale, shares, per_image, per_text = saved
    gradients = partial(gradients, candidates=candidates)
    local = _spread(gradients, axes, (split, split, whole, split, split), (split, split))
    logs = jnp.log(shares)
    d_image, d_text = local(image, text, scale, per_image - logs, per_text - logs)
    own = (shares if candidates else shares / 2)[:, None]
    d_image -= own * text.astype(jnp.float32)
    d_text -= own * image.astype(jnp.float32)
    d_scale = jnp.sum(d_image * image.astype(jnp.float32))
    if not candidates:
        d_scale += jnp.sum(d_text * text.astype(jnp.float32))
    into = cotangent * scale
    results = (into * d_image).astype(image.dtype), (into * d_text).astype(text.dtype), cotangent * d_scale
    return *results, jnp.zeros_like(shares)


_contrastive.defvjp(_forward, _backward)


def _spread(function: Any, axes: Axes, in_specs: Any, out_specs: Any) -> Any:
    function = partial(function, axes=axes)
    if not axes:
        return function
    # Scan carries start as constants and become device-dependent, which the replication check would refuse.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _logits(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=exact(image, text))
    return scale * product("id,jd->ij", image, text)


def _weighted(
    image: jax.Array, text: jax.Array, scale: jax.Array, per_image: jax.Array, per_text: jax.Array, candidates: bool
) -> tuple[jax.Array, jax.Array]:
    """Σ_j w_ij text_j and Σ_i w_ij image_i of one block, in float32; without candidates' gradients of a part of w."""
    logits = _logits(image, text, scale)
    rows, columns = jnp.exp(logits - per_image[:, None]) / 2, jnp.exp(logits - per_text[None, :]) / 2
    if candidates:
        rows = columns = rows + columns
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    product = partial(jnp.einsum, precision=exact(rows, image, text))
    return product("ij,jd->id", rows, text), product("ij,id->jd", columns, image)


def _rows_normalisers(image: jax.Array, text: jax.Array, scale: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp of this device's images over all texts, and of its texts over all images; both [b]."""
    if not axes:
        logits = _logits(image, text, scale)
        return jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)
    logits = _logits(image, jax.lax.all_gather(text, axes, tiled=True), scale)
    # One part per device of every text's sum; each device receives all parts of its own texts.
    parts = jax.nn.logsumexp(logits, axis=0).reshape(-1, text.shape[0])
    parts = jax.lax.all_to_all(parts, axes, split_axis=0, concat_axis=0)
    return jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(parts, axis=0)


def _rows_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    per_image: jax.Array,
    per_text: jax.Array,
    *,
    axes: Axes,
    candidates: bool,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sums of `_weighted` over the global batch, for this device's images and texts."""
    if not axes:
        return _weighted(image, text, scale, per_image, per_text, candidates)
    text, per_text = (jax.lax.all_gather(x, axes, tiled=True) for x in (text, per_text))
    d_image, d_text = _weighted(image, text, scale, per_image, per_text, candidates)
    return d_image, jax.lax.psum_scatter(d_text, axes, tiled=True)


def _next(tree: Any, axes: Axes) -> Any:
    """Hands every array to the next device of the ring and receives the previous one's."""
    if not axes:
        return tree
    size = jax.lax.axis_size(axes)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, [(i, (i + 1) % size) for i in range(size)]), tree)


def _turns(step: Any, start: Any, axes: Axes) -> Any:
    """Runs `step` once for every device's texts, which are home again after the last turn."""
    return jax.lax.scan(step, start, length=jax.lax.axis_size(axes) if axes else 1)[0]


def _pieces(x: jax.Array) -> jax.Array:
    """[b, …] as [pieces, rows, …] with the most rows that divide b and are at most `BLOCK_ROWS`."""
    rows = max(size for size in range(1, min(BLOCK_ROWS, x.shape[0]) + 1) if x.shape[0] % size == 0)
    return x.reshape(-1, rows, *x.shape[1:])


def _ring_normalisers(image: jax.Array, text: jax.Array, scale: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """What `_rows_normalisers` returns, from one block of logits at a time."""

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        per_image, texts, per_text = carry

        def block(per_text: jax.Array, piece: Any) -> tuple[jax.Array, jax.Array]:
            rows, so_far = piece
            logits = _logits(rows, texts, scale)
            so_far = jnp.logaddexp(so_far, jax.nn.logsumexp(logits, axis=1))
            return jnp.logaddexp(per_text, jax.nn.logsumexp(logits, axis=0)), so_far

        per_text, per_image = jax.lax.scan(block, per_text, (images, per_image))
        return (per_image, *_next((texts, per_text), axes)), None

    images = _pieces(image)
    nothing = jnp.full(text.shape[:1], -jnp.inf)
    per_image, _, per_text = _turns(turn, (_pieces(nothing), text, nothing), axes)
    return per_image.reshape(-1), per_text


def _ring_gradients(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    per_image: jax.Array,
    per_text: jax.Array,
    *,
    axes: Axes,
    candidates: bool,
) -> tuple[jax.Array, jax.Array]:
    """What `_rows_gradients` returns, from one block of logits at a time; the texts' sums travel with them."""

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        d_images, texts, per_text, d_texts = carry

        def block(d_texts: jax.Array, piece: Any) -> tuple[jax.Array, jax.Array]:
            rows, per_image, d_rows = piece
            more_rows, more_texts = _weighted(rows, texts, scale, per_image, per_text, candidates)
            return d_texts + more_texts, d_rows + more_rows

        d_texts, d_images = jax.lax.scan(block, d_texts, (images, normalisers, d_images))
        return (d_images, *_next((texts, per_text, d_texts), axes)), None

    images, normalisers = _pieces(image), _pieces(per_image)
    zeros = jnp.zeros(text.shape, jnp.float32)
    d_images, _, _, d_text = _turns(turn, (_pieces(zeros), text, per_text, zeros), axes)
    return d_images.reshape(image.shape), d_text


_FORMS: dict[str, tuple[Any, Any]] = {
    "rows": (_rows_normalisers, _rows_gradients),
    "ring": (_ring_normalisers, _ring_gradients),
}
