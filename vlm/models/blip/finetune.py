"""Fine-tuning on labelled examples: captions, answers, classes, right and wrong texts (BLIP, section 5)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlm.data.masking import IGNORE
from vlm.family import Batch, Extra, Metrics, Params
from vlm.losses import cross_entropy, token_losses
from vlm.models.blip.momentum import alpha, apply, update_teacher, with_teacher

Step = tuple[jax.Array, tuple[Metrics, Extra]]


def caption(model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any) -> Step:
    """Language modelling of `labels` [B, L]: token t is predicted from the image and the tokens before t.

    Labels stand where their tokens stand (no shift in the data); −100 at the prompt and at padding.
    """
    image_rng, text_rng = jax.random.split(rng)
    states = apply(model, params, image_rng, model.encode_image_states, batch["image"]).last_hidden_state
    logits = apply(model, params, text_rng, model.decode_logits, batch["tokens"], batch["mask"], states)
    value = cross_entropy(logits[:, :-1], batch["labels"][:, 1:], label_smoothing=config.label_smoothing)
    return value, ({"lm": value}, extra)


def vqa(model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any) -> Step:
    """Σ_j weight_j · (summed token loss of answer j), over the number of questions (Li et al. 2021, section 4).

    `answer_tokens`, `answer_mask` [B, A, L] and `answer_weights` [B, A]; answers that are not there weigh 0. The
    decoder reads the states of the question, which has read the image.
    """
    image_rng, question_rng, answer_rng = jax.random.split(rng, 3)
    states = apply(model, params, image_rng, model.encode_image_states, batch["image"]).last_hidden_state
    question = batch["tokens"], batch["mask"]
    read = apply(model, params, question_rng, model.encode_multimodal, *question, states).last_hidden_state
    answers, mask = batch["answer_tokens"], batch["answer_mask"]
    logits = apply(model, params, answer_rng, model.decode_logits, answers, mask, read, question[1])
    targets = jnp.where(mask, answers, IGNORE)[..., 1:]
    losses = token_losses(logits[..., :-1, :], targets, label_smoothing=config.label_smoothing).sum(axis=-1)
    value = jnp.sum(losses * batch["answer_weights"]) / len(losses)
    return value, ({"lm": value}, extra)


def classification(model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any) -> Step:
    """Cross-entropy of `labels` [B] from an image, or a pair of images, and a text (NLVR2, SNLI-VE).

    With `distill`: (1 − alpha) · that + alpha · cross-entropy towards the momentum teacher's distribution.
    """
    student_rng, teacher_rng = jax.random.split(rng)
    logits = _classify(model, params, batch, student_rng)
    labels = batch["labels"]
    value = cross_entropy(logits, labels)
    terms = {"cross_entropy": value, "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)}
    if not config.distill:
        return value, (terms, extra)
    teacher = update_teacher(extra["teacher"], params, config.momentum)
    soft = jax.lax.stop_gradient(_classify(model, with_teacher(teacher, params), batch, teacher_rng))
    distance = -jnp.mean(jnp.sum(jax.nn.softmax(soft) * jax.nn.log_softmax(logits), axis=-1))
    weight = alpha(extra["step"], config.alpha, config.alpha_steps)
    extra = extra | {"teacher": teacher, "step": extra["step"] + 1}
    terms |= {"distillation": distance, "alpha": weight}
    return (1.0 - weight) * value + weight * distance, (terms, extra)


def matching(model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any) -> Step:
    """Cross-entropy of the matching head with `labels` [B]: 1 where the text is right for the image."""
    del config
    image_rng, text_rng = jax.random.split(rng)
    states = apply(model, params, image_rng, model.encode_image_states, batch["image"]).last_hidden_state
    return _matched(model, params, extra, batch, text_rng, states)


def dialog(model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any) -> Step:
    """The same where texts also read the states of the image's caption: 1 where the last answer is right (VisDial)."""
    del config
    context_rng, text_rng = jax.random.split(rng)
    known = batch["image"], batch["caption_tokens"], batch["caption_mask"]
    context, mask = apply(model, params, context_rng, model.encode_dialog, *known)
    return _matched(model, params, extra, batch, text_rng, context, mask)


def _matched(
    model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, context: jax.Array, mask: Any = None
) -> Step:
    logits = apply(model, params, rng, model.match, batch["tokens"], batch["mask"], context, mask)
    value, labels = cross_entropy(logits, batch["labels"]), batch["labels"]
    return value, ({"itm": value, "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels)}, extra)


def _classify(model: Any, params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
    image_rng, text_rng = jax.random.split(rng)
    states = apply(model, params, image_rng, model.encode_image_states, batch["image"]).last_hidden_state
    logits = apply(model, params, text_rng, model.classify, batch["tokens"], batch["mask"], states)
    return jnp.asarray(logits, jnp.float32)
