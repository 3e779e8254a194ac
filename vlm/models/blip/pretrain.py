"""One pretraining step: contrastive, matching and language-modelling loss of the same pairs (BLIP, section 3.2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlm.data.masking import IGNORE
from vlm.family import Batch, Extra, Metrics, Params
from vlm.losses import cross_entropy
from vlm.models.blip.matching import itm
from vlm.models.blip.momentum import apply, contrast, similarities

FLOOR = 1e-4
"""Added to every candidate's probability of being drawn as a negative."""


def pretrain(
    model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any
) -> tuple[jax.Array, tuple[Metrics, Extra]]:
    """Contrastive + matching + language-modelling loss, unweighted; see `vlm.family.Loss`.

    The image encoder runs once for the student and once for the teacher. Negatives are drawn by the student's
    similarity with the teacher's features of the group.
    """
    image_rng, contrast_rng, itm_rng, lm_rng = jax.random.split(rng, 4)
    seen = apply(model, params, image_rng, model.encode_image_states, batch["image"])
    states = seen.last_hidden_state
    itc_value, found, terms, extra = contrast(model, params, extra, batch, seen, contrast_rng, config)

    group = config.group_size or len(states)

    def scores(ours: str, theirs: str) -> jax.Array:
        cosines = similarities(found[ours], found[f"{theirs}_teacher"], group)
        return jnp.log(jax.nn.softmax(cosines / params["temperature"], axis=-1) + FLOOR)

    others = ~jnp.tile(jnp.eye(group, dtype=bool), (len(states) // group, 1))
    candidates = scores("image", "text"), scores("text", "image")
    itm_value, itm_terms = itm(model, params, batch, states, itm_rng, candidates, others)

    tokens, mask = batch["tokens"], batch["mask"]
    logits = apply(model, params, lm_rng, model.decode_logits, tokens, mask, states)
    targets = jnp.where(mask, tokens, IGNORE)[:, 1:]
    lm_value = cross_entropy(logits[:, :-1], targets, label_smoothing=config.label_smoothing)
    return itc_value + itm_value + lm_value, ({**terms, **itm_terms, "lm": lm_value}, extra)
