"""Retrieval in two steps (Li et al. 2021, section 4): a shortlist by embeddings, ranked anew by a matching head.

The published score of a listed pair is the head's logit for "matched" plus the cosine; what is not listed is placed
last. Every pair is matched once, whichever of the two listed the other. Each host keeps the tokens of its own images.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from vlm.data.source import Source
from vlm.errors import UserError
from vlm.evaluation import retrieval
from vlm.evaluation.captions import pixels
from vlm.evaluation.embed import LENGTH_STEP, Embedder
from vlm.evaluation.evaluator import Result, Sampling, Task
from vlm.evaluation.feed import Advance, Feed, Note, blank_images, trace
from vlm.evaluation.image_text import queries, rows_of, texts_of


@dataclasses.dataclass(frozen=True)
class MatchingConfig:
    """Settings of one retrieval evaluation with matching.

    Attributes:
      data: a source whose examples have an image (or the frames of a video) and one or several texts.
      text: the field with the text or the list of texts; captions: use only the first so many of an image.
      shortlist: how many of the nearest are matched, each way (published: 256 for COCO, 128 for Flickr30k and videos).
      texts_per_step: texts that are matched with one image at a time.
      tokens_dtype: in which image tokens wait in the hosts' memory.
      k: recalls are reported at these depths.
      pictures: queries shown on the HTML page, each way.
    """

    data: dict[str, Any]
    text: str = "text"
    captions: int | None = None
    shortlist: int = 256
    texts_per_step: int = 32
    tokens_dtype: Literal["float32", "bfloat16"] = "float32"
    k: tuple[int, ...] = (1, 5, 10)
    language: str = ""
    bootstrap: Sampling = Sampling()
    pictures: int = 16

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k: expected depths of at least 1, found {self.k}")
        for name in ("captions", "shortlist", "texts_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


@dataclasses.dataclass(frozen=True)
class MatchingRetrieval(Task):
    """A prepared evaluation."""

    config: MatchingConfig

    @property
    def uses_text(self) -> bool:
        """Whether the text tower of a contrastive model is needed."""
        return True

    def check(self, embedder: Embedder) -> None:
        """Traces the model; raises UserError where it cannot embed or match."""
        embedder.check()
        image = jnp.asarray(embedder.processor(images=blank_images())["image"])
        texts = embedder.processor(texts=["a"])
        model, params = embedder.model, embedder.params
        trace("match images and texts", lambda *x: _match(model, *x[:3], _see(model, x[0], x[3])[1]), params,
              texts["tokens"][:, None], texts["mask"][:, None], image)  # fmt: skip

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Ranks by embeddings, by the matching head, and by their sum."""
        gallery = Gallery.of(embedder, self.source, self.note, self.config.tokens_dtype, advance)
        texts = [text for note in gallery.notes for text in note["texts"]]
        text_image = np.repeat(np.arange(len(gallery.notes)), [len(note["texts"]) for note in gallery.notes])
        embeds = embedder.texts(texts)
        cosines = np.asarray(gallery.embeds @ embeds.T, np.float32)
        listed = shortlists(cosines, self.config.shortlist), shortlists(cosines.T, self.config.shortlist)
        pairs = listed[0] | listed[1].T
        logits = gallery.match(embedder, texts, pairs, self.config.texts_per_step)
        found = {"itc/": retrieval.ranks(gallery.embeds, embeds, text_image)}
        for name, scores in (("itm/", logits), ("", logits + cosines)):
            found[name] = retrieval.score_ranks(only(scores, listed[0]), only(scores.T, listed[1]), text_image)
        best = only(logits + cosines, listed[0]), only((logits + cosines).T, listed[1])

        def metrics(weights: np.ndarray | None = None) -> dict[str, float]:
            each = {name: _recall(ranks, self.config.k, weights) for name, ranks in found.items()}
            return {name + key: value for name, values in reversed(each.items()) for key, value in values.items()}

        count = len(gallery.notes)
        shown = np.unique(np.linspace(0, count - 1, min(self.config.pictures, count)).astype(int))
        answers = (lambda image: best[0][image]), (lambda text: best[1][text])
        shown_queries = queries(shown, gallery.notes, texts, found[""], np.arange(count), *answers)
        details = {
            "language": self.config.language,
            "images": count,
            "texts": len(texts),
            "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            "data_fingerprint": self.source.fingerprint,
            "shortlist": [min(self.config.shortlist, len(texts)), min(self.config.shortlist, count)],
            "pairs": int(pairs.sum()),
        }
        return Result(
            "matching_retrieval",
            metrics(),
            self.config.bootstrap.intervals(metrics, count),
            n=count,
            unreadable=len(self.source) - count,
            details=details,
            examples=rows_of(gallery.notes, found[""], texts),
            page={"source": self.source, "queries": shown_queries},
        )

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key and texts of an example."""
        texts = texts_of(example, self.config.text)
        return {"key": str(example.get("key")), "texts": texts[: self.config.captions]}


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The images of a data set: their embeddings on every host, their tokens on the host that has read them.

    Attributes:
      embeds: [I, D], unit vectors. notes: of each image.
      place: int64[I, 2], which run of rows of a batch (one per host, unless hosts share rows) holds each image's
        tokens, and where in that run's list.
      tokens: [n, M, C], those of this host's run.
    """

    embeds: np.ndarray
    notes: list[Note]
    place: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, embedder: Embedder, source: Source, note: Any, dtype: str, advance: Advance | None) -> Gallery:
        """Runs the image tower over a data set.

        Raises:
          UserError: nothing can be read, or embeddings are not numbers.
        """
        feed, processor = embedder.feed, embedder.processor
        size = feed.local_rows()[1] - feed.local_rows()[0]
        embeds, notes, places, tokens = [], [], [], []
        for fed in feed.examples(source, lambda e: pixels(processor, e), note, advance):
            vectors, states = _see(embedder.model, embedder.params, feed.put(fed.local)["image"])
            run, row = np.divmod(fed.valid, size)
            places.append(np.stack([run, len(tokens) * size + row], axis=1))
            tokens.append(feed.local(states).astype(jnp.dtype(dtype)))
            embeds.append(feed.fetch(vectors)[fed.valid])
            notes += fed.notes
        found = np.concatenate(embeds)
        if not np.isfinite(found).all():
            raise UserError("image embeddings are not finite unit vectors: has training diverged?")
        return cls(found, notes, np.concatenate(places), np.concatenate(tokens))

    def match(
        self, embedder: Embedder, texts: list[str], pairs: Bool[np.ndarray, "i t"], together: int
    ) -> Float[np.ndarray, "i t"]:
        """The matching logits of some pairs of image and text, float32; -inf for the others.

        Args:
          together: texts per image and step.

        Raises:
          UserError: a logit is not a number.
        """
        feed = embedder.feed
        start, stop = feed.local_rows()
        size = stop - start
        tokens, mask = _text_rows(embedder, texts)
        work = [_chunks(np.flatnonzero(self.place[:, 0] == run), pairs, together) for run in range(feed.rows // size)]
        result = np.full(pairs.shape, -np.inf, np.float32)
        for step in range(-(-max(len(chunks) for chunks in work) // size)):
            parts = [chunks[step * size : (step + 1) * size] for chunks in work]
            mine = parts[start // size]
            rows = np.array([np.resize(chunk, together) for _, chunk in mine] + [[0] * together] * (size - len(mine)))
            where = [self.place[image, 1] for image, _ in mine] + [0] * (size - len(mine))
            logits = self._logits(feed, embedder, tokens[rows], mask[rows], np.asarray(where, np.int64))
            for run, part in enumerate(parts):
                for row, (image, chunk) in enumerate(part, run * size):
                    result[image, chunk] = logits[row, : len(chunk)]
        if np.isnan(result).any():
            raise UserError("matching logits are not finite: has training diverged?")
        return result

    def _logits(self, feed: Feed, embedder: Embedder, tokens: Any, mask: Any, where: np.ndarray) -> np.ndarray:
        placed = feed.put({"tokens": tokens, "mask": mask, "states": self.tokens[where]})
        return feed.fetch(_match(embedder.model, embedder.params, *placed.values()))


def shortlists(scores: Float[np.ndarray, "q n"], count: int) -> Bool[np.ndarray, "q n"]:
    """Marks each row's `count` greatest scores; among equal ones the first."""
    marked = np.zeros(scores.shape, bool)
    for row, values in enumerate(scores):
        marked[row, np.argsort(-values, kind="stable")[:count]] = True
    return marked


def only(scores: Float[np.ndarray, "q n"], listed: Bool[np.ndarray, "q n"]) -> Float[np.ndarray, "q n"]:
    """The scores of what is listed, -inf elsewhere."""
    return np.where(listed, scores, -np.inf)


def _chunks(images: np.ndarray, pairs: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """The texts of each image, at most `size` at a time."""
    found = []
    for image in images:
        texts = np.flatnonzero(pairs[image])
        found += [(int(image), texts[start : start + size]) for start in range(0, len(texts), size)]
    return found


def _text_rows(embedder: Embedder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    batch = embedder.processor(texts=texts)
    tokens, mask = np.asarray(batch["tokens"], np.int32), np.asarray(batch["mask"], bool)
    columns = min(-(-int(mask.sum(axis=1).max()) // LENGTH_STEP) * LENGTH_STEP, tokens.shape[1])
    return tokens[:, :columns], mask[:, :columns]


def _recall(found: retrieval.Ranks, ks: tuple[int, ...], weights: np.ndarray | None) -> dict[str, float]:
    """`retrieval.recall`, each direction's mean, and without weights the median places, from 1 on."""
    metrics = retrieval.recall(found, ks, weights)
    for way in ("text_to_image", "image_to_text"):
        metrics[f"{way}_mean_recall"] = float(np.mean([metrics[f"{way}_recall@{k}"] for k in ks]))
        if weights is None:
            metrics[f"{way}_median_rank"] = float(np.median(getattr(found, way) + 1))
    return metrics


@functools.partial(jax.jit, static_argnums=0)
def _see(model: Any, params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    output = model.apply({"params": params}, image=image)
    return output.image_embeds.astype(jnp.float32), output.last_hidden_state


@functools.partial(jax.jit, static_argnums=0)
def _match(model: Any, params: Any, tokens: jax.Array, mask: jax.Array, states: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens, mask, states, method="match")[..., 1].astype(jnp.float32)
