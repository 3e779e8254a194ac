"""One step of retrieval fine-tuning (BLIP, section 5.1): all texts of an image are its positives."""

from __future__ import annotations

from typing import Any

import jax

from vlm.family import Batch, Extra, Metrics, Params
from vlm.models.blip.matching import itm
from vlm.models.blip.momentum import apply, contrast, in_groups, similarities


def retrieval(
    model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any
) -> tuple[jax.Array, tuple[Metrics, Extra]]:
    """Contrastive + matching loss, unweighted; see `vlm.family.Loss`.

    `image_id` int[B] says which rows show the same image: targets are uniform over them, in the batch and in the
    queue, and they are never each other's negatives. Negatives are drawn by the student's own similarities.
    """
    image_rng, contrast_rng, itm_rng = jax.random.split(rng, 3)
    seen = apply(model, params, image_rng, model.encode_image_states, batch["image"])
    states = seen.last_hidden_state
    itc_value, found, terms, extra = contrast(model, params, extra, batch, seen, contrast_rng, config)

    group: int = (None if config.all_negatives else config.group_size) or len(states)
    ids = in_groups(batch["image_id"], group)
    others = (ids[:, :, None] != ids[:, None, :]).reshape(len(states), group)
    pairs = (("image", "text"), ("text", "image"))
    candidates = [similarities(found[a], found[b], group) / params["temperature"] for a, b in pairs]
    itm_value, itm_terms = itm(model, params, batch, states, itm_rng, (candidates[0], candidates[1]), others)
    return itc_value + itm_value, ({**terms, **itm_terms}, extra)
