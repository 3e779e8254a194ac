"""AltCLIP (arXiv 2211.06679), and plain CLIP as its teacher."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vlm.family import Family
from vlm.models.altclip import weights
from vlm.models.altclip.loss import LossConfig, init_extra, loss
from vlm.models.altclip.model import AltCLIP, AltCLIPConfig
from vlm.models.altclip.processor import Processor, ProcessorConfig


def example(config: AltCLIPConfig) -> dict[str, Any]:
    """One zero image and one two-token text, for the towers that the model has."""
    batch: dict[str, Any] = {}
    if config.vision is not None:
        size = config.vision.image_size
        batch["image"] = jnp.zeros((1, size, size, 3), jnp.float32)
    if config.text is not None or config.clip_text is not None:
        batch["tokens"] = jnp.zeros((1, 2), jnp.int32)
        batch["mask"] = jnp.ones((1, 2), bool)
    return batch


FAMILY = Family(
    name="altclip",
    config_type=AltCLIPConfig,
    module=AltCLIP,
    loss_type=LossConfig,
    loss=loss,
    init_extra=init_extra,
    example=example,
    processor_type=ProcessorConfig,
    processor=Processor,
    weights=weights,
)
