"""Image-text matching with hard negatives (Li et al. 2021, arXiv 2107.07651, section 3.2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm.family import Batch, Metrics, Params
from vlm.losses import token_losses
from vlm.models.blip.momentum import apply, in_groups


def hard_negatives(
    rng: jax.Array, scores: Float[Array, "b g"], allowed: Bool[Array, "b g"]
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """Draws one candidate of every row's group with probability proportional to exp(score) among the allowed.

    Returns:
      Its position in the group, and whether there was any to draw.
    """
    drawn = jax.random.categorical(rng, jnp.where(allowed, scores, -jnp.inf), axis=-1)
    return drawn, allowed.any(axis=-1)


def pick(x: Shaped[Array, "b ..."], drawn: Int[Array, " b"], group: int) -> Shaped[Array, "b ..."]:
    """Rows of `x` at positions within each row's group."""
    rows = jax.vmap(lambda rows, index: rows[index])(in_groups(x, group), in_groups(drawn, group))
    return rows.reshape(x.shape)


def itm(
    model: Any,
    params: Params,
    batch: Batch,
    seen: Float[Array, "b m c"],
    rng: jax.Array,
    scores: tuple[Float[Array, "b g"], Float[Array, "b g"]],
    allowed: Bool[Array, "b g"],
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of 3B pairs: every text with its image, with a wrong image, and a wrong text with every image.

    Args:
      seen: image tokens; gradients flow into those of negatives too.
      scores: of candidate texts for each image, and of candidate images for each text, up to a constant per row.
      allowed: candidates that are no match. A row without any has no negative and counts only as positive.
    """
    group = allowed.shape[1]
    text_rng, image_rng, dropout_rng = jax.random.split(rng, 3)
    text, has_text = hard_negatives(text_rng, jax.lax.stop_gradient(scores[0]), allowed)
    image, has_image = hard_negatives(image_rng, jax.lax.stop_gradient(scores[1]), allowed)

    def rows(*parts: jax.Array) -> jax.Array:  # the three pairs of an example lie together, so that no row moves
        return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    tokens, mask = (rows(x, x, pick(x, text, group)) for x in (batch["tokens"], batch["mask"]))
    logits = apply(model, params, dropout_rng, model.match, tokens, mask, rows(seen, pick(seen, image, group), seen))
    labels = jnp.tile(jnp.array([1, 0, 0]), len(seen))
    counts = rows(jnp.ones_like(has_text), has_image, has_text).astype(jnp.float32)
    total = jnp.sum(counts)
    value = jnp.sum(counts * token_losses(logits, labels)) / total
    right = jnp.sum(counts * (jnp.argmax(logits, axis=-1) == labels)) / total
    return value, {"itm": value, "itm_accuracy": right}
