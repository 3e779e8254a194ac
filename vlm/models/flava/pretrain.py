"""One pretraining step of FLAVA (Singh et al. 2022, section 3.2) on images, on texts, or on pairs.

=========  ==============================================  ==============================
batch      passes                                          losses
=========  ==============================================  ==============================
images     masked image                                    mim
texts      masked text                                     mlm
pairs      image, text, masked image, masked text, fusion  contrastive; mmm_image,
           of the masked two                               mmm_text, itm
=========  ==============================================  ==============================

Only what a loss reads is computed: the last layer of an encoder and the heads run on the masked positions, gathered to
a static number, and on the class token. Batches of evaluation (`valid`) have no dropout, and metrics say how many
positions or pairs they are means over.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from vlm.data.masking import IGNORE
from vlm.encoders.output import EncoderOutput
from vlm.errors import UserError
from vlm.family import COUNT, Batch, Metrics, Params
from vlm.layers.arrays import AnyArray
from vlm.layers.norms import normalise
from vlm.layers.transformer import first_tokens
from vlm.losses import contrastive, token_losses

LOSSES = {"images": ("mim",), "texts": ("mlm",), "pairs": ("mmm_image", "mmm_text", "itm", "contrastive")}
"""The six losses, by the batches that have them; a loss setting of the same name weights each."""

Hidden = tuple[Int[Array, "b k"], Bool[Array, "b k"]]
"""Positions that were hidden, and which of them are real."""


def pretrain(model: Any, params: Params, batch: Batch, rng: jax.Array, config: Any) -> tuple[Any, Metrics]:
    """Sum of the weighted losses that the batch's modality has; every term in the metrics is before its weight.

    Raises:
      UserError: a batch without a modality, or without what a loss of its modality needs.
    """
    has = {"image": "image" in batch, "text": "tokens" in batch}
    if not any(has.values()):
        raise UserError(f"objective 'pretrain' needs image or tokens; the examples give {', '.join(sorted(batch))}")
    if has["image"] and (config.mmm_image if has["text"] else config.mim):
        _need(batch, "patch_mask", "config.processor.mask_patches")
        if "patch_labels" not in batch and "codebook_image" not in batch:
            raise UserError("objective 'pretrain' needs codebook_image or patch_labels for the masked patches")
    if has["text"] and (config.mmm_text if has["image"] else config.mlm):
        _need(batch, "masked_tokens", "config.processor.mlm_probability")
        _need(batch, "token_labels", "config.processor.mlm_probability")
    kind = "pairs" if all(has.values()) else "images" if has["image"] else "texts"
    if not any(getattr(config, name) for name in LOSSES[kind]):
        raise UserError(f"batches of {kind} train nothing: config.loss has 0 for {' and '.join(LOSSES[kind])}")
    if kind == "pairs" and config.itm:
        _need(batch, "itm_labels", "config.processor.itm_probability; without them config.loss.itm=0")
    if "itm_labels" in batch and batch["itm_labels"].ndim != 1:  # a column would be compared with every row's logits
        raise UserError(f"itm_labels: expected one number for each pair, found shape {batch['itm_labels'].shape}")
    if grids := _grids_in_rows(batch):
        batch = {**batch, **grids}
    step = _Step(model, params, batch, rng, config)
    terms = getattr(step, kind)()
    weighted = [getattr(config, name) * terms[name] for name in LOSSES[kind] if name in terms]
    return sum(weighted, jnp.zeros(())), terms


def _need(batch: Batch, name: str, setting: str) -> None:
    if name not in batch:
        raise UserError(f"objective 'pretrain' needs {name} ({setting}); the examples give {', '.join(sorted(batch))}")


def _grids_in_rows(batch: Batch) -> dict[str, Any]:
    """What a batch has of the patches as grids, as one row for each picture."""
    grids = {name: batch[name] for name in ("patch_mask", "patch_labels") if name in batch}
    rows = {name: grid.reshape(len(grid), -1) for name, grid in grids.items()}
    if len({row.shape for row in rows.values()}) > 1:
        sizes = " and ".join(f"{name} {row.shape[1]}" for name, row in rows.items())
        raise UserError(f"expected as many visual words as patches, found {sizes}")
    return {name: row for name, row in rows.items() if grids[name].ndim > 2}


def masked_positions(selected: Bool[AnyArray, "b n"], count: int | None) -> Hidden:
    """The first `count` selected positions of each row, and which of them are real: rows may have fewer."""
    selected = jnp.asarray(selected)
    order = jnp.argsort(~selected, axis=1, stable=True)[:, :count]
    return order, jnp.take_along_axis(selected, order, axis=1)


def grouped_mean(
    values: Shaped[AnyArray, "b ..."], keep: Bool[AnyArray, "b ..."], size: int | None
) -> Float[Array, ""]:
    """The mean of the kept values of every `size` rows, averaged over the groups; a group without any counts as 0."""
    rows = len(values) // (len(values) if size is None else size)
    values, keep = (jnp.asarray(x, jnp.float32).reshape(rows, -1) for x in (values, keep))
    return jnp.mean((values * keep).sum(1) / jnp.maximum(keep.sum(1), 1.0))


class _Step:
    """The passes and losses of one batch."""

    def __init__(self, model: Any, params: Params, batch: Batch, rng: jax.Array, config: Any):
        self.model, self.params, self.batch, self.config = model, params, batch, config
        self.rng, self.mode = rng, {"deterministic": "valid" in batch}
        self.mode_of_images = {**self.mode, "interpolate_positions": config.interpolate_positions}
        self.count = len(batch["image"] if "image" in batch else batch["tokens"])
        if config.group_size is not None and self.count % config.group_size:
            found = f"found {config.group_size}"
            raise UserError(f"config.loss.group_size: expected a divisor of the batch of {self.count}, {found}")
        self.valid = jnp.asarray(batch.get("valid", np.ones(self.count, bool)))

    def apply(self, method: Any, *inputs: Any, masked: bool = True, **more: Any) -> Any:
        """Calls a method of the model; the pass of unmasked inputs has its own dropout."""
        rngs = {"dropout": jax.random.fold_in(self.rng, masked)}
        return self.model.apply({"params": self.params}, *inputs, method=method, rngs=rngs, **more)

    def images(self) -> Metrics:
        """Masked image modelling."""
        hidden = self._hidden_patches()
        return self._patches("mim", self._image(True, 1 + hidden[0]).last_hidden_state, hidden, self.valid)

    def texts(self) -> Metrics:
        """Masked language modelling."""
        most = self.config.max_masked_tokens
        hidden = self._hidden_tokens(most)
        return self._tokens("mlm", self._text(True, hidden[0]).last_hidden_state, hidden, self.valid, most)

    def pairs(self) -> Metrics:
        """Contrastive on the pair as it is; masked modelling and matching on the masked pair."""
        config, batch = self.config, self.batch
        fused = config.mmm_image or config.mmm_text or config.itm
        masked = (self._image(True), self._text(True)) if fused else None
        positive, terms = self._positive(), {}
        if config.contrastive:
            first = first_tokens(batch["tokens"])
            whole = (
                masked[0] if masked and "patch_mask" not in batch else self._image(False, first),
                masked[1] if masked and "masked_tokens" not in batch else self._text(False, first),
            )
            terms |= self._contrastive(*whole, positive)
        if masked:
            terms |= self._fused(*masked, positive)
        return terms

    def _contrastive(self, image: EncoderOutput, text: EncoderOutput, positive: jax.Array) -> Metrics:
        towers = (("vision", image), ("text", text))
        embeds: Any = [normalise(self.apply(self.model.project, name, output)) for name, output in towers]
        shares = positive / self._groups(positive)
        scale = jnp.exp(self.params["logit_scale"])
        gradients = self.config.candidate_gradients
        value = contrastive(embeds[0], embeds[1], scale, weights=shares, candidate_gradients=gradients)
        cosine = jnp.sum(embeds[0] * embeds[1], axis=-1)
        found = {"contrastive": value, "positive_cosine": jnp.sum(shares * cosine)}
        return self._counted(found, positive * self.valid.all()) | {"logit_scale": scale}

    def _fused(self, image: EncoderOutput, text: EncoderOutput, positive: jax.Array) -> Metrics:
        """The losses of the fusion encoder: its first token, hidden patches and hidden words."""
        config, batch, most = self.config, self.batch, self.config.max_masked_words
        patches = self._hidden_patches() if config.mmm_image else None
        words = self._hidden_tokens(most) if config.mmm_text else None
        first_word = self.model.first_patch + image.pre_norm_state.shape[1] - 1
        read = [first_tokens(batch["tokens"])]
        read += [] if patches is None else [self.model.first_patch + patches[0]]
        read += [] if words is None else [first_word + words[0]]
        outputs_at = {"outputs_at": jnp.concatenate(read, axis=1), **self.mode}
        output = self.apply(self.model.encode_multimodal, image, text, batch["mask"], **outputs_at)
        states = jnp.split(output.last_hidden_state, np.cumsum([part.shape[1] for part in read])[:-1], axis=1)
        terms = {}
        if patches is not None:
            terms |= self._patches("mmm_image", states[1], patches, positive)
        if words is not None:
            terms |= self._tokens("mmm_text", states[-1], words, positive, most)
        if config.itm:
            terms |= self._matching(states[0])
        return terms

    def _image(self, masked: bool, outputs_at: Any = None) -> EncoderOutput:
        """The image encoder's output for the images with the batch's patches hidden, or as they are."""
        patch_mask = self.batch.get("patch_mask") if masked else None
        mode = {"outputs_at": outputs_at, **self.mode_of_images}
        return self.apply(self.model.encode_image_states, self.batch["image"], patch_mask, masked=masked, **mode)

    def _text(self, masked: bool, outputs_at: Any = None) -> EncoderOutput:
        """The same of the text encoder."""
        batch = self.batch
        tokens = batch.get("masked_tokens", batch["tokens"]) if masked else batch["tokens"]
        given = {name: batch[name] for name in ("token_types", "positions") if name in batch}
        mode = {"outputs_at": outputs_at, **given, **self.mode}
        return self.apply(self.model.encode_text_states, tokens, batch["mask"], masked=masked, **mode)

    def _positive(self) -> jax.Array:
        """Which pairs [B] belong together; in training all of a group where none does."""
        labels, size = self.batch.get("itm_labels"), self.config.group_size
        if labels is None or (self.config.unfiltered_without_itm and not self.config.itm):
            return self.valid
        if "valid" in self.batch:
            return self.valid & (labels != 0)
        groups = (labels != 0).reshape(-1, self.count if size is None else size)
        return (groups | ~groups.any(1, keepdims=True)).reshape(-1)

    def _groups(self, positive: jax.Array) -> jax.Array:
        """What a pair's 1 is divided by in a mean over positive pairs, group by group."""
        size = self.config.group_size or self.count
        groups = positive.astype(jnp.float32).reshape(-1, size)
        return jnp.repeat(groups.sum(1) * len(groups), size)

    def _matching(self, hidden: jax.Array) -> Metrics:
        labels = (self.batch["itm_labels"] != 0).astype(jnp.int32)
        logits = self.apply(self.model.predict_match, hidden)
        losses, size = token_losses(logits, labels), self.config.group_size
        right = grouped_mean(logits.argmax(-1) == labels, self.valid, size)
        return self._counted({"itm": grouped_mean(losses, self.valid, size), "itm_accuracy": right}, self.valid)

    def _hidden_patches(self) -> Hidden:
        return masked_positions(self.batch["patch_mask"], self.config.max_masked_patches)

    def _hidden_tokens(self, most: int | None) -> Hidden:
        return masked_positions(self.batch["token_labels"] != IGNORE, most)

    def _patches(self, head: str, states: jax.Array, hidden: Hidden, rows: jax.Array) -> Metrics:
        """Cross-entropy of the visual words of masked patches, from the states of those alone."""
        index, real = hidden
        if "patch_labels" in self.batch:
            labels = jnp.take_along_axis(self.batch["patch_labels"], index, axis=1)
        else:
            labels = jax.lax.stop_gradient(self._codebook(index))
        terms = self._predict(head, states, labels, real, rows)
        return terms | self._dropped(head, self.batch["patch_mask"], real, self.config.max_masked_patches)

    def _codebook(self, index: jax.Array) -> jax.Array:
        if self.model.config.codebook is None:
            raise UserError("batches hold codebook_image, and config.model.codebook is None: found no codebook for it")
        if self.params["codebook"]["out"]["kernel"].dtype != jnp.float32:
            raise UserError("the image codebook needs float32: expected config.precision.frozen='float32'")
        image, patches = self.batch["codebook_image"], self.batch["patch_mask"].shape[1]
        words = math.prod(side // self.model.config.codebook.downsampling for side in image.shape[1:3])
        if words != patches:  # labels of other places would be taken, or of none
            raise UserError(
                f"config.processor.codebook_size: pictures of {image.shape[1]}x{image.shape[2]} have {words} visual "
                f"words, expected one for each of the {patches} patches"
            )
        if image.dtype == jnp.uint8:
            image = 0.8 / 255 * image.astype(jnp.float32) + 0.1
        return self.apply(self.model.codebook_labels, jax.lax.stop_gradient(image), index)

    def _tokens(self, head: str, states: jax.Array, hidden: Hidden, rows: jax.Array, most: int | None) -> Metrics:
        """Cross-entropy of the tokens that were hidden, `most` of a row, from the states of those alone."""
        index, real = hidden
        labels = jnp.take_along_axis(self.batch["token_labels"], index, axis=1)
        selected = self.batch["token_labels"] != IGNORE
        return self._predict(head, states, labels, real, rows) | self._dropped(head, selected, real, most)

    def _dropped(self, head: str, selected: jax.Array, real: jax.Array, most: int | None) -> Metrics:
        """The share of hidden positions that the head does not see, where it sees only so many of a row."""
        lost = (selected.sum() - real.sum()) / jnp.maximum(selected.sum(), 1)
        return {} if most is None else {f"{head}_dropped": lost}

    def _predict(self, head: str, states: Any, labels: Any, real: Any, rows: Any) -> Metrics:
        logits = self.apply(self.model.predict_masked, head, states)
        keep, size = real & rows[:, None], self.config.group_size
        losses = token_losses(logits, jnp.where(keep, labels, IGNORE))
        right = grouped_mean(logits.argmax(-1) == labels, keep, size)
        return self._counted({head: grouped_mean(losses, keep, size), f"{head}_accuracy": right}, keep)

    def _counted(self, terms: Metrics, keep: Any) -> Metrics:
        """With what each is a mean over, in evaluation."""
        return terms | {COUNT + name: keep.sum() for name in terms} if "valid" in self.batch else terms
