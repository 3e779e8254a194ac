"""BLIP (Li et al. 2022, arXiv 2201.12086): captioning, question answering, retrieval with matching, pretraining."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vlm.family import Family
from vlm.models.blip import weights
from vlm.models.blip.config import BLIPConfig
from vlm.models.blip.loss import LossConfig, init_extra, loss
from vlm.models.blip.model import BLIP
from vlm.models.blip.processor import Processor, ProcessorConfig


def example(config: BLIPConfig) -> dict[str, Any]:
    """One zero image (two for a model of pairs) and one two-token text, as far as the model has towers for them."""
    batch: dict[str, Any] = {}
    if config.vision is not None:
        size, images = config.vision.image_size, (config.num_images,) if config.num_images > 1 else ()
        batch["image"] = jnp.zeros((1, *images, size, size, 3), jnp.float32)
    if config.text is not None or config.decoder is not None:
        batch |= {"tokens": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)}
    return batch


FAMILY = Family(
    name="blip",
    config_type=BLIPConfig,
    module=BLIP,
    loss_type=LossConfig,
    loss=loss,
    init_extra=init_extra,
    example=example,
    processor_type=ProcessorConfig,
    processor=Processor,
    weights=weights,
)
