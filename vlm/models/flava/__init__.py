"""FLAVA (Singh et al. 2022, arXiv 2112.04482): image, text and fusion encoders, pretrained with six losses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from vlm.family import Family
from vlm.models.flava import weights
from vlm.models.flava.config import FLAVAConfig
from vlm.models.flava.loss import LossConfig, init_extra, loss
from vlm.models.flava.model import FLAVA
from vlm.models.flava.processor import Processor, ProcessorConfig


def example(config: FLAVAConfig) -> dict[str, Any]:
    """One zero image and one two-token text, as far as the model reads them."""
    inputs: dict[str, Any] = {}
    if config.vision is not None:
        inputs["image"] = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3), jnp.float32)
    if config.text is not None:
        inputs |= {"tokens": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)}
    return inputs


FAMILY = Family(
    name="flava",
    config_type=FLAVAConfig,
    module=FLAVA,
    loss_type=LossConfig,
    loss=loss,
    init_extra=init_extra,
    example=example,
    processor_type=ProcessorConfig,
    processor=Processor,
    weights=weights,
)
