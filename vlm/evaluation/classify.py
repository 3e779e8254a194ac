"""Classes, or values, that a fine-tuned model's classifier gives to images, texts, pairs of texts, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.data.source import Source
from vlm.errors import UserError, did_you_mean
from vlm.evaluation import classification
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Sampling, Task, field, first_note, parse_class
from vlm.evaluation.feed import Advance, Note, trace
from vlm.evaluation.heads import INPUTS, has_head, head_inputs, head_scores
from vlm.evaluation.image_text import texts_of
from vlm.evaluation.metrics import labels as metric

OF_CLASSES = ("accuracy", "mean_per_class_recall", "f1", "matthews", "auroc")
OF_VALUES = ("pearson", "spearman", "mean_squared_error")


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """Settings of one evaluation of a classifier.

    Attributes:
      data: a source whose examples have what the model reads (`image`, texts) and, to be scored, a label.
      text, text_pair: the fields with the sentence and, where examples are pairs, the second one.
      label: the field with the class number, the name of a class or the value; None: predictions are not scored.
      names: of the classes, in the order of their numbers.
      metrics: "accuracy", "mean_per_class_recall", "f1" and "auroc" of class 1 (of two), "matthews"; or, of a model
        that gives one value, "pearson", "spearman", "mean_squared_error".
      pictures: examples shown on the HTML page.
    """

    data: dict[str, Any]
    text: str = "text"
    text_pair: str | None = None
    label: str | None = "label"
    names: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    language: str = ""
    bootstrap: Sampling = Sampling()
    pictures: int = 48

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in (*OF_CLASSES, *OF_VALUES):
                raise ValueError(f"metrics: no metric {name!r}{did_you_mean(name, (*OF_CLASSES, *OF_VALUES))}")
        if not self.metrics or len({name in OF_VALUES for name in self.metrics}) > 1:
            raise ValueError(f"metrics: expected some of classes or some of values, found {self.metrics}")

    @property
    def values(self) -> bool:
        """Whether a value is predicted and not a class."""
        return self.metrics[0] in OF_VALUES


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """A prepared evaluation."""

    config: ClassificationConfig

    def check(self, embedder: Embedder) -> None:
        """Traces the model on the first readable example; raises UserError where it cannot classify it."""
        count = check_classifies(embedder, self.source, self._inputs)
        names = self.config.names
        if self.config.values != (count == 1):
            raise UserError(f"metrics {', '.join(self.config.metrics)} do not fit a model with {count} outputs")
        if names and count != len(names):
            raise UserError(f"names: expected {count}, as the model has classes, found {len(names)}")
        if count != 2 and (two := [name for name in ("f1", "auroc") if name in self.config.metrics]):
            raise UserError(f"metrics: {two[0]} is of two classes, and the model has {count}")

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Classifies every example."""
        notes, scores = classify(embedder, self.source, self._inputs, self.note, advance)
        labels = np.array([note["label"] for note in notes]) if self.config.label is not None else None
        if labels is not None and not self.config.values and labels.max() >= scores.shape[1]:
            raise UserError(f"label {labels.max()} is outside the model's {scores.shape[1]} classes")
        rows = [note | self._prediction(row) for note, row in zip(notes, scores, strict=True)]
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        if labels is not None:
            if not self.config.values:
                rows = [row | {"correct": row["prediction"] == row["label"]} for row in rows]

            def measure(weights: np.ndarray | None = None) -> dict[str, float]:
                return measured(self.config.metrics, scores, labels, weights)

            metrics, intervals = measure(), self.config.bootstrap.intervals(measure, len(rows))
        details = {"data_fingerprint": self.source.fingerprint, "language": self.config.language}
        return Result(
            "classification",
            metrics,
            intervals,
            n=len(rows),
            unreadable=len(self.source) - len(rows),
            details=details | {"classes": scores.shape[1], "names": list(self.config.names)},
            examples=rows,
            page={"source": self.source, "cards": [self._card(r) for r in rows], "pictures": self.config.pictures},
        )

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key, texts and label of an example."""
        config = self.config
        note: Note = {"key": str(example.get("key"))}
        for name in (config.text, config.text_pair):
            if name is not None and example.get(name) is not None:
                note[name] = texts_of(example, name)[0]
        if config.label is None:
            return note
        value, where = field(example, config.label), f"example {example.get('key')!r}"
        return note | {"label": _number(value, where) if config.values else parse_class(value, config.names, where)}

    def _inputs(self, processor: Any, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return head_inputs(processor, example, self.config.text, self.config.text_pair)

    def _prediction(self, scores: np.ndarray) -> dict[str, Any]:
        if self.config.values:
            return {"prediction": round(float(scores[0]), 6)}
        best, shifted = int(scores.argmax()), np.exp(scores.astype(np.float64) - scores.max())
        return {"prediction": best, "probability": round(float(1 / shifted.sum()), 6)}

    def _card(self, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = (self.config.text, self.config.text_pair or "")
        asked = " | ".join(row[name] for name in texts if name in row)
        wanted = [self._name(row["label"])] if "label" in row else []
        said = self._name(row["prediction"])
        return {"index": row["index"], "asked": asked, "said": said, "wanted": wanted, "correct": row.get("correct")}

    def _name(self, value: Any) -> str:
        return self.config.names[value] if self.config.names else f"{value:g}"


def classify(
    embedder: Embedder, source: Source, inputs: Any, note: Any, advance: Advance | None = None
) -> tuple[list[Note], np.ndarray]:
    """Notes of the readable examples, and their scores [N, K], on every host.

    Args:
      inputs: (processor, example) -> arrays without batch axis.

    Raises:
      UserError: scores that are not finite.
    """
    feed, notes, parts = embedder.feed, [], []
    for fed in feed.examples(source, lambda example: inputs(embedder.processor, example), note, advance):
        found = feed.fetch(head_scores(embedder.model, "classify", embedder.params, feed.put(fed.local)))
        notes += fed.notes
        parts.append(np.asarray(found)[fed.valid])
    scores = np.concatenate(parts)
    if not np.isfinite(scores).all():
        raise UserError("the classifier's scores are not finite: has training diverged?")
    return notes, scores


def check_classifies(embedder: Embedder, source: Source, inputs: Any) -> int:
    """Traces the model on the first readable example, without running it, and returns the number of its outputs.

    Raises:
      UserError: it has no classifier, or does not read what the example gives.
    """
    if not has_head(embedder.model, "classify"):
        raise UserError(f"{type(embedder.model).__name__}: this model has no classifier")
    readable = first_note(source, lambda example: {"example": example})
    row = inputs(embedder.processor, readable.get("example") or source[0])
    batch = {name: row[name][None] for name in INPUTS if name in row}

    def call(params: Any, batch: Any) -> Any:
        return head_scores(embedder.model, "classify", params, batch)

    shape = trace("classify such examples", call, embedder.params, batch).shape
    if len(shape) != 2:
        raise UserError(f"expected one row of scores per example, found an array of shape {shape}")
    return shape[1]


def measured(
    names: tuple[str, ...], scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None
) -> dict[str, float]:
    """The metrics that `names` names; `weights`: how often each example counts."""
    if names[0] in OF_VALUES:
        values = scores[:, 0].astype(np.float64)
        found = {"pearson": lambda: metric.pearson(values, labels, weights)}
        found |= {"spearman": lambda: metric.spearman(values, labels, weights)}
        found |= {"mean_squared_error": lambda: float(np.average((values - labels) ** 2, weights=weights))}
        return {name: found[name]() for name in names}
    ranks, best, classes = classification.label_ranks(scores, labels), scores.argmax(axis=1), scores.shape[1]
    found = {"accuracy": lambda: classification.accuracy(ranks, 1, weights)}
    found |= {"mean_per_class_recall": lambda: classification.mean_per_class_recall(ranks, labels, classes, weights)}
    found |= {"f1": lambda: metric.f1(best, labels, weights=weights)}
    found |= {"matthews": lambda: metric.matthews(best, labels, weights)}
    found |= {"auroc": lambda: metric.auroc(scores[:, 1].astype(np.float64) - scores[:, 0], labels, weights)}
    return {name: found[name]() for name in names}


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise UserError(f"{where}: expected a number as label, found {value!r:.60}")
    return number
