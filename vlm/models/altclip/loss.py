"""AltCLIP's objectives (arXiv 2211.06679, section 3): teacher learning on parallel text, then contrastive tuning."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vlm.encoders.clip_text import ClipTextConfig
from vlm.errors import UserError
from vlm.family import Batch, Extra, Metrics, Params
from vlm.layers.norms import normalise
from vlm.losses import chunked_cross_entropy, contrastive, mean_squared_error
from vlm.models.altclip.model import AltCLIP, AltCLIPConfig
from vlm.strict import at_least, unused


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the objectives.

    Attributes:
      objective: "teacher_learning" (stage 1), "contrastive" (stage 2, and CLIP pretraining) or "lm" (masked language
        modelling on the text tower).
      target: what the student regresses onto, the teacher's end-of-text state ("pooled") or its projection.
      teacher: architecture of the live teacher; None where batches carry precomputed targets.
      lock_image: the image tower is neither trained nor run with dropout (LiT, Zhai et al. 2022).
      form: how the batch × batch logits are computed, see `vlm.losses.contrastive`.
    """

    objective: Literal["teacher_learning", "contrastive", "lm"] = "contrastive"
    target: Literal["pooled", "projected"] = "pooled"
    teacher: ClipTextConfig | None = None
    teacher_projection_dim: int = 768
    lock_image: bool = True
    form: Literal["auto", "rows", "ring"] = "auto"

    def __post_init__(self) -> None:
        at_least(1, self, "teacher_projection_dim")
        if self.objective != "teacher_learning":
            unused(self, f"objective {self.objective!r}", "teacher", "target", "teacher_projection_dim")
        if self.objective != "contrastive":
            unused(self, f"objective {self.objective!r}", "lock_image", "form")

    @property
    def packs_texts(self) -> bool:
        """Whether the text tower takes a batch's `packing` (`layers.packing`)."""
        return self.objective != "lm"

    @property
    def locked(self) -> str:
        """Regular expression of the parameters that the objective does not train."""
        towers = {
            "contrastive": r"vision/.*|vision_projection/.*" if self.lock_image else "",
            "teacher_learning": r"vision/.*|vision_projection/.*|logit_scale"
            + (r"|text_projection/.*" if self.target == "pooled" else ""),
            "lm": r"vision/.*|(vision|text)_projection/.*|text_(norm|transformation)/.*|logit_scale",
        }
        return towers[self.objective]

    def check_targets(self, cache: str, processor: Any) -> None:
        """Whether a run learns from the embeddings in `cache` (`data.teacher_cache`), and from nothing else.

        Raises:
          UserError: another objective, or a live teacher or its tokenizer beside the cache.
        """
        if self.objective != "teacher_learning":
            expected = f"objective {self.objective!r} learns from no embeddings computed before; expected None"
            raise UserError(f"config.data.teacher_cache: {expected}, found {cache!r}")
        tokenizer = processor.teacher_tokenizer
        live = {"loss.teacher": self.teacher and "a live teacher", "processor.teacher_tokenizer": tokenizer}
        for name, found in live.items():
            if found is not None:
                found = repr(found) if found is tokenizer else found
                raise UserError(f"config.{name}: expected None with config.data.teacher_cache, found {found}")

    def target_dim(self, model: AltCLIPConfig) -> int:
        """Numbers of the embedding that the student is trained towards."""
        if self.target == "projected" and model.projection_dim is not None:
            return model.projection_dim
        tower = model.text or model.clip_text
        transformed = model.text is not None and model.text_transformation
        return model.project_dim if transformed or tower is None else tower.hidden_size


REQUIRED = {"contrastive": ("image", "tokens", "mask"), "teacher_learning": ("tokens", "mask")}
REQUIRED["lm"] = ("tokens", "mask", "labels")
"""What a batch must hold for each objective."""


def teacher_model(config: LossConfig) -> AltCLIP | None:
    """The text half of the CLIP that stage 1 learns from, or None where targets are precomputed."""
    if config.objective != "teacher_learning" or config.teacher is None:
        return None
    return AltCLIP(
        AltCLIPConfig(vision=None, text=None, clip_text=config.teacher, projection_dim=config.teacher_projection_dim)
    )


def init_extra(model: AltCLIP, params: Params, rng: jax.Array, config: LossConfig) -> Extra:
    """The teacher's parameters, where there is a live teacher; its real weights come from `config.init`."""
    del model, params
    teacher = teacher_model(config)
    if teacher is None:
        return {}
    return {"teacher": teacher.init(rng, tokens=jnp.zeros((1, 2), jnp.int32))["params"]}


def loss(
    model: AltCLIP, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: LossConfig
) -> tuple[jax.Array, tuple[Metrics, Extra]]:
    """Dispatches on the configured objective; see `vlm.family.Loss`.

    Raises:
      UserError: the batches lack something that the objective needs.
    """
    missing = [name for name in REQUIRED[config.objective] if name not in batch]
    if missing:
        hint = " (config.processor.mlm_probability makes labels)" if missing == ["labels"] else ""
        given = ", ".join(sorted(batch))
        raise UserError(f"objective {config.objective!r} needs {', '.join(missing)}; the examples give {given}{hint}")
    value, metrics = OBJECTIVES[config.objective](model, params, extra, batch, rng, config)
    return value, (metrics, extra)


def teacher_targets(config: LossConfig, extra: Extra, batch: Batch) -> jax.Array:
    """The embeddings to regress onto [B, D]: precomputed (`batch["target"]`) or from the live teacher, in float32."""
    if "target" in batch:
        return batch["target"].astype(jnp.float32)
    teacher = teacher_model(config)
    if teacher is None:
        raise UserError(
            "teacher learning needs a live teacher (config.loss.teacher) or embeddings computed before "
            "(config.data.teacher_cache), found neither"
        )
    if "teacher_tokens" not in batch:
        raise UserError(
            "teacher learning: examples need a `source_text`, and config.processor.teacher_tokenizer must be given"
        )
    length, limit = batch["teacher_tokens"].shape[1], config.teacher.max_length if config.teacher else 0
    if length > limit:
        raise UserError(f"config.processor.teacher_max_length: expected at most the teacher's {limit}, found {length}")
    method = teacher.encode_text_pooled if config.target == "pooled" else teacher.encode_text
    target = teacher.apply(
        {"params": extra["teacher"]}, batch["teacher_tokens"], batch.get("teacher_mask"), method=method
    )
    return jax.lax.stop_gradient(jnp.asarray(target, jnp.float32))


def _teacher_learning(
    model: AltCLIP, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """Mean squared error between the student's text embedding of one language and the teacher's of English."""
    method = model.encode_text_pooled if config.target == "pooled" else model.encode_text
    student = _apply(model, params, rng, method, *_text(batch))
    target = teacher_targets(config, extra, batch)
    if student.shape != target.shape:
        raise UserError(
            f"teacher learning, target {config.target!r}: the student's embedding has {student.shape[-1]} numbers, "
            f"the teacher's {target.shape[-1]}"
        )
    value = mean_squared_error(student, target)
    cosine = jnp.sum(normalise(student) * normalise(target), axis=-1).mean()
    return value, {"mse": value, "cosine": cosine}


def _contrastive(
    model: AltCLIP, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, figure 3)."""
    del extra
    image_rng, text_rng = jax.random.split(rng)
    image = _apply(model, params, image_rng, model.encode_image, batch["image"], deterministic=config.lock_image)
    text = _apply(model, params, text_rng, model.encode_text, *_text(batch))
    scale = jnp.exp(params["logit_scale"])
    image, text = normalise(jax.lax.stop_gradient(image) if config.lock_image else image), normalise(text)
    value = contrastive(image, text, scale, form=config.form)
    positive = jnp.sum(image * text, axis=-1).mean()
    return value, {"contrastive": value, "logit_scale": scale, "positive_cosine": positive}


def _lm(
    model: AltCLIP, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: LossConfig
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy at the masked positions; `labels` is −100 everywhere else.

    One position of all rows at a time, so that the logits never exist for more than B tokens and the batch stays on
    its devices.
    """
    del extra, config
    if not model.config.lm_head:
        raise UserError("objective 'lm' needs config.model.lm_head=True")
    hidden = _apply(model, params, rng, model.encode_states, batch["tokens"], batch["mask"])
    hidden, labels = jnp.swapaxes(hidden, 0, 1), jnp.swapaxes(batch["labels"], 0, 1)

    def head(rows: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, rows, method=model.lm_decode))

    rows = hidden.reshape(-1, hidden.shape[-1])
    value = chunked_cross_entropy(rows, head, labels.reshape(-1), chunk=labels.shape[1])
    return value, {"lm": value}


def _text(batch: Batch) -> tuple[Any, ...]:
    return batch["tokens"], batch["mask"], batch.get("packing")


OBJECTIVES: dict[str, Any] = {"teacher_learning": _teacher_learning, "contrastive": _contrastive, "lm": _lm}


def _apply(
    model: AltCLIP, params: Params, rng: jax.Array, method: Any, *inputs: jax.Array, deterministic: bool = False
) -> jax.Array:
    output = model.apply({"params": params}, *inputs, deterministic=deterministic, method=method, rngs={"dropout": rng})
    return jnp.asarray(output)
