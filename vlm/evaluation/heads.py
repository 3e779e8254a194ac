"""Scores of a model's classification and matching heads, whatever the family's way to call them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vlm.errors import UserError
from vlm.evaluation.evaluator import field
from vlm.evaluation.feed import pictures_of
from vlm.evaluation.image_text import texts_of

INPUTS = ("image", "tokens", "mask", "token_types")


def has_head(model: Any, head: str) -> bool:
    """Whether a model has a "match" or "classify" head."""
    config = getattr(model, "config", None)
    if head == "classify":
        return any(getattr(config, name, None) is not None for name in ("num_labels", "classifier"))
    fused = bool(getattr(config, "heads", False)) and getattr(config, "fusion", None) is not None
    return bool(getattr(config, "itm", False)) or fused


@functools.partial(jax.jit, static_argnums=(0, 1))
def head_scores(model: Any, head: str, params: Any, batch: Mapping[str, jax.Array]) -> Float[jax.Array, "b ... k"]:
    """Scores [B, K], before a softmax, in float32; [B, A, K] of several texts per image, tokens [B, A, L].

    Args:
      head: "classify" or "match". A head whose method takes `image` is given all inputs that it knows; another one
        texts, and the image's states as context.
      batch: of `INPUTS` what there is.
    """
    names = inspect.signature(getattr(type(model), head)).parameters
    if "image" not in names:
        states = model.apply({"params": params}, batch["image"], method="encode_image_states").last_hidden_state
        return _float(model.apply({"params": params}, batch["tokens"], batch["mask"], states, method=head))
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in names and name in batch}
    shape = inputs["tokens"].shape[:-1] if "tokens" in inputs else inputs["image"].shape[:1]
    if len(shape) == 2:
        pairs = {name: array.reshape(-1, array.shape[-1]) for name, array in inputs.items() if name != "image"}
        inputs = pairs | {"image": jnp.repeat(inputs["image"], shape[1], axis=0)}
    if "image" in inputs and "interpolate_positions" in names:
        vision = getattr(model.config, "vision", None)
        inputs["interpolate_positions"] = vision is not None and vision.image_size != inputs["image"].shape[1]
    found = model.apply({"params": params}, **inputs, method=head)
    return _float(found.reshape(*shape, -1))


def head_inputs(
    processor: Any, example: Mapping[str, Any], text: str = "text", text_pair: str | None = None
) -> dict[str, np.ndarray]:
    """What a raw example gives a head to read, of `INPUTS`, without batch axis: a transform for `Feed.examples`.

    Args:
      text, text_pair: fields; of several texts the first is taken.

    Raises:
      UserError: neither image nor text.
    """
    inputs: dict[str, Any] = {}
    if example.get("image") is not None:
        inputs["images"] = [pictures_of(example)]
    if example.get(text) is not None:
        inputs["texts"] = texts_of(example, text)[:1]
        if text_pair is not None:
            field(example, text_pair)
            inputs["pairs"] = texts_of(example, text_pair)[:1]
    if not inputs:
        raise UserError(f"example {example.get('key')!r} has neither image nor {text!r}; it has {', '.join(example)}")
    return {name: np.asarray(array[0]) for name, array in processor(**inputs).items() if name in INPUTS}


def _float(scores: Any) -> jax.Array:
    return jnp.asarray(scores, jnp.float32)
