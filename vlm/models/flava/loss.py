"""FLAVA's objectives (Singh et al. 2022, arXiv 2112.04482): pretraining on every modality, and fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from vlm.errors import UserError
from vlm.family import Batch, Extra, Metrics, Params
from vlm.models.flava.finetune import classification, regression, soft_labels
from vlm.models.flava.model import FLAVA
from vlm.models.flava.pretrain import WEIGHTS, pretrain


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the objectives.

    Attributes:
      objective: "pretrain" (what a batch's modality allows of the six losses below), or fine-tuning of the classifier:
        "classification" (`labels` int32[B]), "regression" (`labels` float32[B]) or "soft_labels" (`label_scores`
        float32[B, K], one sigmoid per class).
      mim, mlm: weights of masked image modelling of images alone, and masked language modelling of texts alone.
      mmm_image, mmm_text: of the same, predicted by the fusion encoder, for pairs.
      itm, contrastive: of image-text matching (on the masked pair), and of the contrastive loss (on the unmasked one).
      max_masked_patches, max_masked_tokens: the heads run on so many positions of a row, which must hold all masked
        ones (`dropped` is logged otherwise); None: all positions.
      candidate_gradients: False: what is gathered from other rows for the contrastive loss carries no gradient.
      group_size: rows that are averaged over before the groups are averaged; the released code's batch of one device.
        None: every loss is a mean over the whole batch.
      unfiltered_without_itm: with itm=0, pairs whose caption was replaced take part in the other losses, as in the
        released code.
    """

    objective: Literal["pretrain", "classification", "regression", "soft_labels"] = "pretrain"
    mim: float = 1.0
    mlm: float = 1.0
    mmm_image: float = 1.0
    mmm_text: float = 1.0
    itm: float = 1.0
    contrastive: float = 1.0
    max_masked_patches: int | None = 75
    max_masked_tokens: int | None = None
    candidate_gradients: bool = True
    group_size: int | None = None
    unfiltered_without_itm: bool = False

    @property
    def locked(self) -> str:
        """Regular expression of the parameters that the objective does not train."""
        unused = ["codebook/.*", "(vision|text|fusion)/pooler/.*"]
        if self.objective != "pretrain":
            return "|".join(
                (*unused, r"(mim|mlm|mmm_image|mmm_text|itm)_head/.*", r"(vision|text)_projection/.*", "logit_scale")
            )
        unused += [f"{name}_head/.*" for name in WEIGHTS if name != "contrastive" and not getattr(self, name)]
        if not self.contrastive:
            unused += [r"(vision|text)_projection/.*", "logit_scale"]
        if not (self.mmm_image or self.mmm_text or self.itm):
            unused += ["fusion/.*", "(vision|text)_to_fusion/.*"]
        return "|".join((*unused, "classifier/.*"))

    def __post_init__(self) -> None:
        for name, least in (("max_masked_patches", 1), ("max_masked_tokens", 1), ("group_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        for name in WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a weight of at least 0, found {getattr(self, name)}")
        if self.objective == "pretrain" and not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"expected a positive weight among {', '.join(WEIGHTS)}, found none")


OBJECTIVES: dict[str, Any] = {
    "pretrain": pretrain,
    "classification": classification,
    "regression": regression,
    "soft_labels": soft_labels,
}


def init_extra(model: FLAVA, params: Params, rng: Any, config: LossConfig) -> Extra:
    """FLAVA trains without other state.

    Raises:
      UserError: the model lacks a part that the objective trains.
    """
    del params, rng
    if config.objective == "pretrain":
        if not model.config.heads:
            raise UserError("objective 'pretrain' needs config.model.heads=True")
    elif model.config.classifier is None:
        raise UserError(f"objective {config.objective!r} needs config.model.classifier")
    return {}


def loss(
    model: FLAVA, params: Params, extra: Extra, batch: Batch, rng: Any, config: LossConfig
) -> tuple[Any, tuple[Metrics, Extra]]:
    """Dispatches on the configured objective; see `vlm.family.Loss`.

    Raises:
      UserError: the batches lack something that the objective needs.
    """
    value, metrics = OBJECTIVES[config.objective](model, params, batch, rng, config)
    return value, (metrics, extra)
