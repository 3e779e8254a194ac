"""True or false: statements about pairs of images (NLVR2, Suhr et al. 2019) or about one (NLVR, Suhr et al. 2017)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vlm.errors import UserError
from vlm.evaluation import classification
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Sampling, Task, field, parse_class
from vlm.evaluation.feed import Advance, Note, blank_images, pictures_of, trace
from vlm.evaluation.heads import has_head, head_scores
from vlm.evaluation.image_text import texts_of
from vlm.evaluation.metrics.nlvr2 import sentence

NAMES = ("false", "true")


@dataclasses.dataclass(frozen=True)
class Nlvr2Config:
    """Settings of one evaluation of true and false statements.

    Attributes:
      data: a source whose examples have an image, or a pair, a statement and whether it is true.
      text, label: the fields; labels are True, False, also as words, or 1, 0.
      identifier: the field with the official identifier; examples of one sentence, by the identifier if it has the
        official form and otherwise by the text, are what consistency is about.
      head: "classify" (two classes, the second is "true"), "match" (the matching head), or "auto": what the model has.
      pictures: examples shown on the HTML page.
    """

    data: dict[str, Any]
    text: str = "text"
    label: str = "label"
    identifier: str = "identifier"
    head: Literal["auto", "classify", "match"] = "auto"
    language: str = ""
    bootstrap: Sampling = Sampling()
    pictures: int = 48


@dataclasses.dataclass(frozen=True)
class Nlvr2(Task):
    """A prepared evaluation."""

    config: Nlvr2Config

    def check(self, embedder: Embedder) -> None:
        """Traces the model; raises UserError where it cannot judge statements."""
        images = getattr(getattr(embedder.model, "config", None), "num_images", 1)
        batch = embedder.processor(images=blank_images(images if images > 1 else None), texts=["a"])
        call = functools.partial(judge, embedder.model, self._head(embedder.model))
        shape = trace("judge statements", call, embedder.params, batch["image"], batch["tokens"], batch["mask"]).shape
        if shape != (1,):
            raise UserError(f"expected a head with two classes, found one with {shape}")

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Judges every statement."""
        feed, processor, head = embedder.feed, embedder.processor, self._head(embedder.model)

        def transform(example: dict[str, Any]) -> dict[str, np.ndarray]:
            batch = processor(images=[pictures_of(example)], texts=[texts_of(example, self.config.text)[0]])
            return {name: np.asarray(batch[name][0]) for name in ("image", "tokens", "mask")}

        rows: list[dict[str, Any]] = []
        for fed in feed.examples(self.source, transform, self.note, advance):
            placed = feed.put(fed.local)
            inputs = (placed[name] for name in ("image", "tokens", "mask"))
            probability = feed.fetch(judge(embedder.model, head, embedder.params, *inputs))
            for note, row in zip(fed.notes, fed.valid, strict=True):
                value = float(probability[row])
                if not np.isfinite(value):
                    raise UserError("probabilities are not finite: has training diverged?")
                right = (value > 0.5) == note["label"]
                rows.append(note | {"probability": round(value, 6), "prediction": value > 0.5, "correct": right})
        return self._result(rows, head)

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key, identifier, statement and label of an example."""
        config = self.config
        value = field(example, config.label)
        value = value.lower() if isinstance(value, str) else value
        label = parse_class(value, NAMES, f"example {example.get('key')!r}") == 1
        note: Note = {"key": str(example.get("key")), "text": texts_of(example, config.text)[0], "label": label}
        name = example.get(config.identifier)
        return note if name is None else note | {"identifier": str(name)}

    def _head(self, model: Any) -> str:
        if self.config.head != "auto":
            return self.config.head
        return "classify" if has_head(model, "classify") else "match"

    def _result(self, rows: list[dict[str, Any]], head: str) -> Result:
        labels, predictions = (np.array([int(row[name]) for row in rows]) for name in ("label", "prediction"))
        sentences, groups = np.unique([_sentence(row) for row in rows], return_inverse=True)
        several = len(sentences) < len(rows)

        def metrics(weights: np.ndarray | None = None) -> dict[str, float]:
            each = np.ones(len(sentences)) if weights is None else weights
            counts, right = each[groups], predictions == labels
            ranks = np.where(right, 0, 1)
            values = {"accuracy": float(np.average(right, weights=counts))}
            recall = classification.mean_per_class_recall(ranks, labels, 2, counts)
            values |= {"balanced_accuracy": recall}
            if several:
                wrong = np.bincount(groups, ~right, len(sentences)) > 0
                values["consistency"] = float(np.average(~wrong, weights=each))
            return values

        true = float(labels.mean())
        cards = [
            {
                "index": row["index"],
                "asked": row["text"],
                "said": f"{NAMES[row['prediction']]} {row['probability']:.2f}",
            }
            | {"wanted": [f"is {NAMES[row['label']]}"], "correct": row["correct"]}
            for row in rows
        ]
        return Result(
            "nlvr2",
            metrics() | {"majority_baseline": max(true, 1 - true)},
            self.config.bootstrap.intervals(metrics, len(sentences)),
            n=len(rows),
            unreadable=len(self.source) - len(rows),
            details={
                "data_fingerprint": self.source.fingerprint,
                "language": self.config.language,
                "head": head,
                "sentences": len(sentences),
            },
            examples=rows,
            page={"source": self.source, "cards": cards, "pictures": self.config.pictures},
            official=[{"identifier": r.get("identifier", r["key"]), "prediction": r["prediction"]} for r in rows],
        )


def _sentence(row: Mapping[str, Any]) -> str:
    """What tells sentences apart: the official identifier without the number of its images, or the text."""
    try:
        return sentence(row["identifier"])
    except (KeyError, UserError):
        return row["text"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def judge(model: Any, head: str, params: Any, image: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Probability [B], or [B, A] of several texts per image, that each statement is true."""
    logits = head_scores(model, head, params, {"image": image, "tokens": tokens, "mask": mask})
    if logits.shape[-1] != 2:
        return jnp.zeros((*logits.shape, 0))
    return jax.nn.softmax(logits, axis=-1)[..., 1]
