"""How BLIP writes: captions from image tokens, answers from the states of a question (`vlm.family.Generative`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlm.data.masking import IGNORE
from vlm.errors import UserError
from vlm.layers.arrays import AnyArray
from vlm.layers.cache import DecoderCache
from vlm.losses import token_losses


class Writing:
    """The generative half of the module `BLIP`."""

    config: Any
    decoding: bool

    @property
    def decoding_parts(self) -> dict[str, int]:
        """The decoder, where the model has one, and the width of its heads."""
        stack = self.config.generative
        return {} if stack is None else {"text" if self.config.shared_decoder else "decoder": stack.head_dim}

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.config.generative.vocab_size

    @property
    def context_length(self) -> int:
        """Rows of the decoder's position table."""
        return self.config.generative.max_length

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """[SEP] ends a text."""
        return (self.config.sep_id,)

    @property
    def pad_id(self) -> int:
        """Fills up rows that have ended."""
        return self.config.pad_id

    @property
    def pretrained_only(self) -> bool:
        """Whether it writes with the parts of pretraining: one fine-tuned for captions has lost the others."""
        return bool(self.config.shared_decoder and self.config.itm and self.config.projection_dim is not None)

    def prompt(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `prefill` takes, for a processor's batch of images and texts.

        A captioner's texts are the beginnings of captions: [DEC] is written over a leading [CLS], and a closing [SEP]
        is taken off, in every row at its own end. Without texts a caption begins with [DEC] alone. The texts of a model
        that answers questions are the questions; answers begin with [DEC].
        """
        if batch.get("image") is None:
            raise UserError("batch: expected image, found " + (", ".join(batch) or "nothing"))
        image = batch["image"] if isinstance(batch["image"], jax.Array) else np.asarray(batch["image"])
        start = np.full((len(image), 1), self.config.bos_id, np.int32)
        alone = {"image": image, "tokens": start, "mask": np.ones((len(image), 1), bool)}
        tokens = batch.get("tokens")
        if self.config.text is not None and self.config.decoder is not None:
            if tokens is None:
                raise UserError("batch: expected questions as tokens and mask, found " + ", ".join(batch))
            tokens = np.asarray(tokens)
            mask, longest = _real(tokens, batch.get("mask")), self.config.text.max_length
            if tokens.shape[1] > longest:
                raise UserError(f"tokens: expected questions of at most {longest} tokens, found {tokens.shape[1]}")
            return alone | {"question": tokens, "question_mask": mask}
        if tokens is None:
            return alone
        tokens = np.array(tokens)
        mask, rows = _real(tokens, batch.get("mask")).copy(), np.arange(len(tokens))
        first, last = mask.argmax(1), mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        leading = tokens[rows, first]
        tokens[rows, first] = np.where(leading == self.config.cls_id, self.config.bos_id, leading)
        mask[rows, last] &= (tokens[rows, last] != self.config.sep_id) | (first == last)
        return {"image": image, "tokens": tokens, "mask": mask}

    def prefill(
        self,
        image: Float[AnyArray, "b ... h w 3"],
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"],
        question: Int[AnyArray, "b q"] | None = None,
        question_mask: Bool[AnyArray, "b q"] | None = None,
        *,
        interpolate_positions: bool = False,
    ) -> tuple[Float[Array, "b v"], DecoderCache]:
        """Logits after each row's last real token, and the cache of the prompt.

        The padding of questions is hidden from the decoder. (The published generation code shows it, so that its
        answers depend on the longest question of the batch; for a question alone there is no difference.)
        """
        module: Any = self
        states = module.encode_image_states(image, interpolate_positions=interpolate_positions).last_hidden_state
        if question is not None:
            states = module.encode_multimodal(question, question_mask, states).last_hidden_state
        hidden, cache = module._decoder.prefill(tokens, mask, states, question_mask)
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return module.lm_logits(hidden), cache

    def decode(self, tokens: Int[AnyArray, "b n"], cache: DecoderCache) -> tuple[Float[Array, "b n v"], DecoderCache]:
        """One step of the n rows of each example."""
        module: Any = self
        hidden, cache = module._decoder.decode(tokens, cache)
        return module.lm_logits(hidden), cache

    def score(
        self,
        image: Float[AnyArray, "b ... h w 3"],
        tokens: Int[AnyArray, "b ... l"],
        mask: Bool[AnyArray, "b ... l"] | None = None,
        question: Int[AnyArray, "b q"] | None = None,
        question_mask: Bool[AnyArray, "b q"] | None = None,
        *,
        labels: Int[AnyArray, "b ... l"] | None = None,
        mean: bool = False,
        interpolate_positions: bool = False,
    ) -> Float[Array, "b ..."]:
        """Negative log-likelihood of each text, in nats: lower is likelier. Nothing is smoothed.

        Args:
          tokens, mask: captions, or answers where the model answers `question`, as `[CLS] text [SEP]` padded on the
            right; or candidates [B, A, L] of each image, which give [B, A].
          labels: the tokens to score, aligned with `tokens`, −100 elsewhere, as a captioner's examples have them
            without the prompt. None: every real token after the first, [SEP] too.
          mean: per scored token instead of the sum over them, −log p(text); 0 where there is none.
        """
        module: Any = self
        states = module.encode_image_states(image, interpolate_positions=interpolate_positions).last_hidden_state
        if question is not None:
            states = module.encode_multimodal(question, question_mask, states).last_hidden_state
        if labels is None:
            labels = jnp.asarray(tokens) if mask is None else jnp.where(mask, tokens, IGNORE)
        targets = jnp.asarray(labels)[..., 1:]
        logits = module.decode_logits(tokens, mask, states, question_mask)
        total = token_losses(logits[..., :-1, :], targets).sum(axis=-1)
        return total / jnp.maximum(jnp.sum(targets != IGNORE, axis=-1), 1) if mean else total


def _real(tokens: np.ndarray, mask: Any) -> np.ndarray:
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if tokens.ndim != 2 or not tokens.shape[1] or mask.shape != tokens.shape:
        raise UserError(f"tokens: expected [B, L] with a mask of this shape, found {tokens.shape} and {mask.shape}")
    return mask
