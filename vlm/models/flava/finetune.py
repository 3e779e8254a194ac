"""Fine-tuning of FLAVA's classifier: classes, one value, or a score for every class."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlm.data.masking import IGNORE
from vlm.errors import UserError
from vlm.family import Batch, Metrics, Params
from vlm.losses import cross_entropy, mean_squared_error

INPUTS = ("image", "tokens", "mask", "token_types")


def outputs(model: Any, params: Params, batch: Batch, rng: jax.Array, labels: str, config: Any) -> tuple[Any, Any]:
    """The classifier's output [B, K] in float32, and the batch's `labels`.

    Raises:
      UserError: the batch lacks them, or an input of the classifier.
    """
    reads = model.config.classifier.input
    needed = {"image": ("image",), "text": ("tokens", "mask"), "multimodal": ("image", "tokens", "mask")}[reads]
    missing = [name for name in (*needed, labels) if name not in batch]
    if missing:
        given = ", ".join(sorted(batch))
        raise UserError(f"objective {config.objective!r} needs {', '.join(missing)}; the examples give {given}")
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    if reads == "text":
        inputs.pop("image", None)
    scores = model.apply(
        {"params": params},
        **inputs,
        interpolate_positions=config.interpolate_positions,
        deterministic=False,
        method=model.classify,
        rngs={"dropout": rng},
    )
    return jnp.asarray(scores, jnp.float32), batch[labels]


def classification(model: Any, params: Params, batch: Batch, rng: jax.Array, config: Any) -> tuple[Any, Metrics]:
    """Cross-entropy of one class per example; a negative label is left out."""
    scores, labels = outputs(model, params, batch, rng, "labels", config)
    labels = jnp.where(labels < 0, IGNORE, labels)
    value = cross_entropy(scores, labels)
    right = jnp.where(labels >= 0, scores.argmax(-1) == labels, False).sum()
    return value, {"cross_entropy": value, "accuracy": right / jnp.maximum((labels >= 0).sum(), 1)}


def regression(model: Any, params: Params, batch: Batch, rng: jax.Array, config: Any) -> tuple[Any, Metrics]:
    """Mean squared error of one value per example."""
    scores, labels = outputs(model, params, batch, rng, "labels", config)
    value = mean_squared_error(scores[:, :1], jnp.asarray(labels, jnp.float32)[:, None])
    return value, {"mse": value}


def soft_labels(model: Any, params: Params, batch: Batch, rng: jax.Array, config: Any) -> tuple[Any, Metrics]:
    """Binary cross-entropy of every class towards its score in [0, 1], summed over classes (VQA answers)."""
    scores, targets = outputs(model, params, batch, rng, "label_scores", config)
    targets = jnp.asarray(targets, jnp.float32)
    terms = jax.nn.softplus(scores) - targets * scores
    value = terms.sum(-1).mean()
    chosen = jnp.take_along_axis(targets, scores.argmax(-1)[:, None], axis=1)
    return value, {"binary_cross_entropy": value, "accuracy": chosen.mean()}
