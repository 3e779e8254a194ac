"""FLAVA's objectives (Singh et al. 2022, arXiv 2112.04482): pretraining on every modality, and fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from vlm.errors import UserError
from vlm.family import Batch, Extra, Metrics, Params
from vlm.models.flava.finetune import classification, regression, soft_labels
from vlm.models.flava.model import FLAVA
from vlm.models.flava.pretrain import LOSSES, pretrain

WEIGHTS = tuple(name for names in LOSSES.values() for name in names)


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
      max_masked_patches, max_masked_tokens, max_masked_words: the heads run on so many positions of a picture, of a
        text alone, and of the text of a pair, which must hold all hidden ones (`…_dropped` logs the share of the
        others); None: all positions.
      candidate_gradients: False: what is gathered from other rows for the contrastive loss carries no gradient.
      group_size: rows that are averaged over before the groups are averaged; the released code's batch of one device.
        None: every loss is a mean over the whole batch.
      unfiltered_without_itm: with itm=0, pairs whose caption was replaced take part in the other losses, as in the
        released code.
      interpolate_positions: images may have another size than the position table's (VQA).
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
    max_masked_words: int | None = None
    candidate_gradients: bool = True
    group_size: int | None = None
    unfiltered_without_itm: bool = False
    interpolate_positions: bool = False

    @property
    def locked(self) -> str:
        """Regular expression of the parameters that the objective does not train."""
        unused = ["codebook/.*", "(vision|text|fusion)/pooler/.*"]
        if self.objective != "pretrain":
            unused += ["vision/mask_embedding", r"(mim|mlm|mmm_image|mmm_text|itm)_head/.*"]
            return "|".join((*unused, r"(vision|text)_projection/.*", "logit_scale"))
        if not (self.mim or self.mmm_image or self.mmm_text or self.itm):
            unused.append("vision/mask_embedding")
        unused += [f"{name}_head/.*" for name in WEIGHTS if name != "contrastive" and not getattr(self, name)]
        if not self.contrastive:
            unused += [r"(vision|text)_projection/.*", "logit_scale"]
        if not (self.mmm_image or self.mmm_text or self.itm):
            unused += ["fusion/.*", "(vision|text)_to_fusion/.*"]
        return "|".join((*unused, "classifier/.*"))

    def __post_init__(self) -> None:
        for name in ("max_masked_patches", "max_masked_tokens", "max_masked_words", "group_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
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
    parts, classifier = model.config, model.config.classifier
    if config.objective == "pretrain":
        headed = [name for name in WEIGHTS if name != "contrastive" and getattr(config, name)]
        if headed and not parts.heads:
            raise UserError(f"config.loss.{headed[0]} needs config.model.heads=True")
        if config.contrastive and parts.vision and parts.text and parts.projection_dim is None:
            raise UserError("config.loss.contrastive needs config.model.projection_dim")
        return {}
    if classifier is None:
        raise UserError(f"objective {config.objective!r} needs config.model.classifier")
    reached = {"image": ("vision",), "text": ("text",), "multimodal": ("vision", "text", "fusion")}[classifier.input]
    idle = [name for name in ("vision", "text", "fusion") if getattr(parts, name) and name not in reached]
    if idle:
        expected = " and ".join(f"config.model.{name}=None" for name in idle)
        raise UserError(f"a classifier of {classifier.input!r} does not reach the {' and '.join(idle)}: {expected}")
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
