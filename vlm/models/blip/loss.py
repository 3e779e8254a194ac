"""BLIP's objectives (Li et al. 2022, arXiv 2201.12086) and the state beside the parameters that they need."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlm.errors import UserError
from vlm.family import Batch, Extra, Metrics, Params
from vlm.layers.linear import partitioned
from vlm.layers.norms import normalise
from vlm.models.blip.finetune import caption, classification, dialog, matching, vqa
from vlm.models.blip.model import BLIP
from vlm.models.blip.momentum import copied
from vlm.models.blip.pretrain import pretrain
from vlm.models.blip.retrieval import retrieval
from vlm.strict import unused

NO_ID = -100
"""What the queue of image ids holds before images have passed."""
_TEACHER = ("momentum", "alpha", "alpha_steps")
_READ: dict[str, tuple[str, ...]] = {
    "pretrain": ("label_smoothing", "queue_size", "group_size", *_TEACHER),
    "retrieval": ("all_negatives", "queue_size", "group_size", *_TEACHER),
    "caption": ("label_smoothing",),
    "vqa": ("label_smoothing",),
    "classification": ("distill",),
    "matching": (),
    "dialog": (),
}
"""By objective: the settings that it reads; classification with `distill` those of the teacher too."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the objectives; one that the objective does not read must keep its default.

    Attributes:
      objective: "pretrain" (contrastive + matching + language modelling), "retrieval" (contrastive + matching),
        "caption", "vqa", "classification" (NLVR2 as well), "matching" (texts labelled 1, right, or 0, wrong, for
        their image) or "dialog" (so are answers, for the image, its caption and the dialog so far).
      label_smoothing: share of every decoder target that is spread over the vocabulary.
      queue_size: teacher features that are kept as further candidates of the contrastive loss.
      momentum: of the teacher, per batch.
      alpha: weight of the teacher's distribution in the targets; rises linearly from 0 over `alpha_steps` batches.
      group_size: rows of the batch that are each other's contrastive candidates and hard negatives; the original's
        batch of one GPU. None: the whole batch.
      all_negatives: hard negatives come from the whole batch all the same (retrieval).
      distill: classification towards the teacher's distribution too.
    """

    objective: Literal["pretrain", "retrieval", "caption", "vqa", "classification", "matching", "dialog"] = "pretrain"
    label_smoothing: float = 0.1
    queue_size: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_steps: int = 0
    group_size: int | None = None
    all_negatives: bool = False
    distill: bool = False

    @property
    def locked(self) -> str:
        """Regular expression of the parameters that the objective does not train."""
        joint, heads = r"(vision|text)_projection/.*|temperature", r"itm_head/.*"
        decoder = r"text/layers/decoder_attention.*|decoder/.*|lm_head/.*"
        unused = {
            "pretrain": ("classifier/.*",),
            "retrieval": (decoder, "classifier/.*"),
            "caption": (joint, heads, r"text/layers/attention(_norm)?/.*", "classifier/.*"),
            "vqa": (joint, heads, "classifier/.*"),
            "classification": (joint, heads, decoder),
            "matching": (joint, decoder, "classifier/.*"),
            "dialog": (joint, decoder, "classifier/.*"),
        }
        return "|".join((*unused[self.objective], "logit_scale"))

    @property
    def copied(self) -> str | None:
        """Regular expression of the parameters that the teacher has a copy of; None without a teacher."""
        if self.objective in ("pretrain", "retrieval"):
            return r"vision/.*|text/(?!layers/decoder_attention).*|(vision|text)_projection/.*"
        if self.objective == "classification" and self.distill:
            return r"vision/.*|text/(?!layers/decoder_attention).*|classifier/.*"
        return None

    def __post_init__(self) -> None:
        reader, read = f"objective {self.objective!r}", ("objective", *_READ.get(self.objective, ()))
        if self.distill and "distill" in read:
            read += _TEACHER
        elif "distill" in read:
            reader += " without distill"
        unused(self, reader, *(field.name for field in dataclasses.fields(self) if field.name not in read))
        for name in ("label_smoothing", "momentum", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a value from 0 to 1, found {getattr(self, name)}")
        for name, least in (("queue_size", 1), ("alpha_steps", 0), ("group_size", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")


REQUIRED = {
    "pretrain": ("image", "tokens", "mask"),
    "retrieval": ("image", "tokens", "mask", "image_id"),
    "caption": ("image", "tokens", "mask", "labels"),
    "vqa": ("image", "tokens", "mask", "answer_tokens", "answer_mask", "answer_weights"),
    "classification": ("image", "tokens", "mask", "labels"),
    "matching": ("image", "tokens", "mask", "labels"),
    "dialog": ("image", "caption_tokens", "caption_mask", "tokens", "mask", "labels"),
}
"""What a batch must hold for each objective."""

OBJECTIVES: dict[str, Any] = {
    "pretrain": pretrain,
    "retrieval": retrieval,
    "caption": caption,
    "vqa": vqa,
    "classification": classification,
    "matching": matching,
    "dialog": dialog,
}


def init_extra(model: BLIP, params: Params, rng: jax.Array, config: LossConfig) -> Extra:
    """The teacher (a copy of the starting parameters), the queues, and how many batches have passed.

    Queues are [queue_size, projection_dim] unit vectors, split over devices like a batch.

    Raises:
      UserError: the model lacks the joint space that the objective compares in.
    """
    if config.copied is None:
        return {}
    extra: Extra = {"teacher": copied(params, config.copied), "step": jnp.zeros((), jnp.int32)}
    if config.objective == "classification":
        return extra
    width = model.config.projection_dim
    if width is None or model.config.temperature is None:
        raise UserError(f"objective {config.objective!r} needs config.model.projection_dim and temperature")
    for name, key in zip(("image_queue", "text_queue"), jax.random.split(rng), strict=True):
        extra[name] = partitioned(normalise(jax.random.normal(key, (config.queue_size, width))), "batch", None)
    extra["queue_index"] = jnp.zeros((), jnp.int32)
    if config.objective == "retrieval":
        extra["id_queue"] = partitioned(jnp.full((config.queue_size,), NO_ID, jnp.int32), "batch")
    return extra


def loss(
    model: BLIP, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: LossConfig
) -> tuple[jax.Array, tuple[Metrics, Extra]]:
    """Dispatches on the configured objective; see `vlm.family.Loss`.

    Raises:
      UserError: the batches lack something that the objective needs.
    """
    missing = [name for name in REQUIRED[config.objective] if name not in batch]
    if missing:
        given = ", ".join(sorted(batch))
        raise UserError(f"objective {config.objective!r} needs {', '.join(missing)}; the examples give {given}")
    return OBJECTIVES[config.objective](model, params, extra, batch, rng, config)
