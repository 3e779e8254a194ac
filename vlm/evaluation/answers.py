"""Candidate answers to a question, ranked by how probable a decoder finds them (Li et al. 2022, published code)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vlm.data.masking import IGNORE
from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.feed import Feed
from vlm.generation import Prepared, prepare
from vlm.generation.generate import bucket, prefill
from vlm.losses import token_losses


@dataclasses.dataclass(frozen=True)
class Ranked:
    """For each of B questions k candidates, those with the most probable first token, in that order.

    Attributes:
      candidates: numbers in the list of answers.
      losses: of each, the summed label-smoothed cross-entropy of its tokens, [SEP] included.
    """

    candidates: Int[np.ndarray, "b k"]
    losses: Float[np.ndarray, "b k"]

    @property
    def best(self) -> Int[np.ndarray, " b"]:
        """The answer with the least loss."""
        return np.take_along_axis(self.candidates, self.losses.argmin(axis=1)[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model that answers, and the candidates as tokens.

    The decoder reads [DEC] once per question and the keys and values of the question's states are computed once: the
    candidates of a question continue them side by side, `chunk` at a time, as samples do in generation.

    Attributes:
      tokens: int32[C, L], the answers after [DEC], ended by [SEP]; mask: bool[C, L].
      shortlist: candidates of each question that are scored whole (all, if there are fewer).
      label_smoothing: of the loss.
      chunk: candidates of each question that run side by side.
    """

    model: Any
    prepared: Prepared
    tokens: np.ndarray
    mask: np.ndarray
    shortlist: int = 128
    label_smoothing: float = 0.1
    chunk: int = 32

    @classmethod
    def of(cls, embedder: Embedder, answers: Sequence[str], **settings: Any) -> Ranker:
        """Lays out the parameters and turns the answers into tokens; they are neither cleaned nor cut.

        Raises:
          UserError: a model that does not generate; an answer that is longer than what its decoder reads.
        """
        batch = embedder.processor.tokenizer(list(answers), padding="longest")
        prepared, longest = prepare(embedder.model, embedder.params), embedder.model.context_length
        length = batch["mask"].sum(axis=1) - 1  # [SEP] is written, not read
        if longest is not None and length.max() > longest:
            found = f"{answers[int(length.argmax())]!r:.60} with {length.max()}"
            raise UserError(f"answer_list: expected answers of at most {longest} tokens, found {found}")
        return cls(embedder.model, prepared, batch["tokens"][:, 1:], batch["mask"][:, 1:], **settings)

    def __call__(self, feed: Feed, batch: Mapping[str, Any]) -> Ranked:
        """Ranks the candidates for every row of a batch: `image` on the devices, questions whole on every host."""
        decoder, params = self.model.clone(decoding=True), self.prepared.params
        arrays = {name: x for name, x in self.model.prompt(batch).items() if x is not None}
        image = arrays.pop("image")
        logits, cache = prefill(decoder, params, {"image": image} | feed.put_whole(arrays))
        ids, first = np.unique(self.tokens[:, 0], return_inverse=True)
        log_probs, losses = feed.fetch(_first_losses(logits, ids, self.label_smoothing))
        count = min(self.shortlist, len(self.tokens))
        candidates = np.argsort(-log_probs[:, first], axis=1, kind="stable")[:, :count]
        total = np.take_along_axis(losses[:, first], candidates, axis=1)
        for start in range(0, count, self.chunk):
            part = candidates[:, start : start + self.chunk]
            total[:, start : start + self.chunk] += self._rest(feed, decoder, cache, part)
        return Ranked(candidates, total)

    def _rest(self, feed: Feed, decoder: Any, cache: Any, candidates: np.ndarray) -> np.ndarray:
        """Loss of what follows the first token of each candidate [B, n]."""
        count = candidates.shape[1]
        mask = self.mask[candidates]
        steps = bucket(int(mask.sum(-1).max()) - 1)  # few shapes to compile
        rows = np.resize(np.arange(count), min(self.chunk, self.shortlist, len(self.tokens)))  # the last chunk: padded
        tokens = np.pad(self.tokens[candidates], ((0, 0), (0, 0), (0, steps + 1)))[:, rows]
        mask = np.pad(mask, ((0, 0), (0, 0), (0, steps + 1)))[:, rows]
        targets = np.where(mask, tokens, IGNORE)[..., 1 : steps + 1].astype(np.int32)
        placed = feed.put_whole({"tokens": tokens[..., :steps].astype(np.int32), "targets": targets})
        params, smoothing = self.prepared.params, self.label_smoothing
        losses = _rest_losses(decoder, params, cache, placed["tokens"], placed["targets"], smoothing)
        return feed.fetch(losses)[:, :count]


@jax.jit
def _first_losses(logits: jax.Array, ids: jax.Array, smoothing: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Of each token `ids` as the first: log-probability and smoothed cross-entropy, [B, ids]."""
    logits = logits.astype(jnp.float32)
    normaliser, chosen = jax.nn.logsumexp(logits, axis=-1, keepdims=True), logits[:, ids]
    target = (1 - smoothing) * chosen + smoothing * logits.mean(axis=-1, keepdims=True)
    return chosen - normaliser, normaliser - target


@partial(jax.jit, static_argnames=("model", "smoothing"))
def _rest_losses(
    model: Any, params: Any, cache: Any, tokens: jax.Array, targets: jax.Array, smoothing: float
) -> jax.Array:
    """Summed losses [B, n] of `targets` [B, n, T], each read after the token of `tokens` at its place."""

    def step(cache: Any, column: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        read, wanted = column
        logits, cache = model.apply({"params": params}, read, cache, method="decode")
        return cache, token_losses(logits, wanted, label_smoothing=smoothing, ignore=IGNORE)

    start = cache.reserve(tokens.shape[2], tokens.shape[1])
    return jax.lax.scan(step, start, (tokens.transpose(2, 0, 1), targets.transpose(2, 0, 1)))[1].sum(axis=0)
