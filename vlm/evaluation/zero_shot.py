"""Zero-shot classification (Radford et al. 2021, section 3.1): class embeddings are means over prompts.

Each prompt's embedding is normalised, a class's are averaged, and the mean is normalised again. Scores are cosines.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm.errors import UserError
from vlm.evaluation import classification, prompts
from vlm.evaluation.embed import TEXT_GROUP, Advance, Embedder, Note
from vlm.evaluation.evaluator import Result, Sampling, Task, field, images_key, parse_class

SHOWN_SCORES = 5


@dataclasses.dataclass(frozen=True)
class ZeroShotConfig:
    """Settings of one zero-shot evaluation.

    Attributes:
      data: a source whose examples have an image and a label.
      classnames: a file, see `vlm.evaluation.prompts`, or the names themselves in order of class number.
      templates: a file, or the templates themselves; `{c}` stands for the class name.
      dataset: which entry to take from files with several data sets.
      language: of names and templates, recorded with the numbers.
      label: the field with the class number or name; with `multi_label` a list of them.
      classes: only these class numbers, for data sets with a part of the classes (ImageNet-A, -R).
      mean_average_precision: also for single labels (multi-label data always gets it).
      pictures: examples shown on the HTML page.
    """

    data: dict[str, Any]
    classnames: str | tuple[str, ...]
    templates: str | tuple[str, ...] = ("{c}",)
    dataset: str | None = None
    language: str = ""
    label: str = "label"
    multi_label: bool = False
    classes: tuple[int, ...] = ()
    mean_average_precision: bool = False
    bootstrap: Sampling = Sampling()
    pictures: int = 48


def class_embeddings(embedder: Embedder, names: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "c d"]:
    """One unit vector per class."""
    together = max(1, TEXT_GROUP // len(templates))
    parts = []
    for start in range(0, len(names), together):
        group = names[start : start + together]
        embeds = embedder.texts([prompts.fill(template, name) for name in group for template in templates])
        means = embeds.reshape(len(group), len(templates), -1).mean(axis=1)
        parts.append(means / np.linalg.norm(means, axis=1, keepdims=True))
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class ZeroShot(Task):
    """A prepared zero-shot evaluation."""

    config: ZeroShotConfig
    names: list[str]
    templates: list[str]

    @classmethod
    def prepare(cls, config: ZeroShotConfig, path: str, limit: int | None = None) -> ZeroShot:
        """Reads class names and templates, opens the data and looks at its first label.

        Raises:
          UserError: any of them is wrong.
        """
        given = config.classnames
        names = list(given) if isinstance(given, tuple) else prompts.load_classnames(given, config.dataset)
        templates = prompts.load_templates(config.templates, config.dataset)
        unknown = [number for number in config.classes if not 0 <= number < len(names)]
        if unknown:
            raise UserError(f"{path}.classes: expected class numbers below {len(names)}, found {unknown[0]}")
        if len(names if not config.classes else config.classes) < 2:
            raise UserError(f"{path}.classnames: expected at least two classes, found {len(names)}")
        return cls._open(config, path, limit, names, templates)

    @property
    def uses_text(self) -> bool:
        """Whether the model's text tower is needed."""
        return True

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Classifies every image."""
        numbers = list(self.config.classes) or list(range(len(self.names)))
        names = [self.names[number] for number in numbers]
        classes = class_embeddings(embedder, names, self.templates)
        images, notes = embedder.all_images(self.source, self.note, advance, images_key(self.config.data, self.source))
        scores = images @ classes.T
        measure = self._multi if self.config.multi_label else self._single
        measured = measure(scores, notes, {number: column for column, number in enumerate(numbers)})
        top = np.argsort(-scores, axis=1, kind="stable")[:, :SHOWN_SCORES]
        examples = [
            {
                **note,
                "prediction": numbers[best[0]],
                "top": [[numbers[column], round(float(row[column]), 6)] for column in best],
                **extra,
            }
            for note, best, row, extra in zip(notes, top, scores, measured.pop("rows"), strict=True)
        ]
        details = {
            "language": self.config.language,
            "classes": len(names),
            "templates": len(self.templates),
            "templates_sha256": prompts.fingerprint(names, self.templates),
            "data_fingerprint": self.source.fingerprint,
            "chance": 1 / len(names),
        }
        page = {"source": self.source, "names": self.names, "pictures": self.config.pictures}
        page |= measured.pop("page")
        unreadable = len(self.source) - len(notes)
        return Result(
            "zero_shot", **measured, n=len(notes), unreadable=unreadable, details=details, examples=examples, page=page
        )

    def _single(self, scores: np.ndarray, notes: list[Note], column: Mapping[int, int]) -> dict[str, Any]:
        labels = np.array([column[note["label"]] for note in notes])
        ranks, count = classification.label_ranks(scores, labels), scores.shape[1]
        metrics = functools.partial(_single_metrics, ranks, labels, count)
        values = metrics(None)
        if self.config.mean_average_precision:
            relevant = labels[:, None] == np.arange(count)
            values["mean_average_precision_11"] = classification.mean_average_precision(scores, relevant)
            values["mean_average_precision"] = classification.mean_average_precision(scores, relevant, points=None)
        page = {
            "recall": classification.class_recall(ranks, labels, count),
            "count": np.bincount(labels, minlength=count),
            "confusion": classification.confusion(np.argmax(scores, axis=1), labels, count),
            "columns": list(column),
        }
        rows = [{"correct": bool(rank == 0), "rank": int(rank) + 1} for rank in ranks]
        return {"metrics": values, "intervals": self._intervals(metrics, len(labels)), "rows": rows, "page": page}

    def _multi(self, scores: np.ndarray, notes: list[Note], column: Mapping[int, int]) -> dict[str, Any]:
        relevant = np.zeros(scores.shape, bool)
        for row, note in enumerate(notes):
            relevant[row, [column[number] for number in note["label"]]] = True

        def metrics(weights: np.ndarray | None) -> dict[str, float]:
            measure = functools.partial(classification.mean_average_precision, scores, relevant, weights=weights)
            return {"mean_average_precision_11": measure(), "mean_average_precision": measure(points=None)}

        right = relevant[np.arange(len(scores)), np.argmax(scores, axis=1)]
        page = {
            "recall": np.array(
                [classification.average_precision(s, r) for s, r in zip(scores.T, relevant.T, strict=True)]
            ),
            "count": relevant.sum(axis=0),
            "columns": list(column),
        }
        rows = [{"correct": bool(value)} for value in right]
        return {"metrics": metrics(None), "intervals": self._intervals(metrics, len(notes)), "rows": rows, "page": page}

    def _intervals(self, metrics: Any, clusters: int) -> dict[str, tuple[float, float]]:
        return self.config.bootstrap.intervals(metrics, clusters)

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key and class number(s) of an example."""
        value, key = field(example, self.config.label), str(example.get("key"))
        if not self.config.multi_label:
            return {"key": key, "label": self._class(value, key)}
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise UserError(f"example {key!r}: expected a list of labels, found {value!r:.60}")
        return {"key": key, "label": [self._class(item, key) for item in value]}

    def _class(self, value: Any, key: str) -> int:
        number = parse_class(value, self.names, f"example {key!r}")
        if self.config.classes and number not in self.config.classes:
            raise UserError(f"example {key!r}: label {number} is not among `classes`")
        return number


def _single_metrics(ranks: np.ndarray, labels: np.ndarray, count: int, weights: np.ndarray | None) -> dict[str, float]:
    values = {"top1": classification.accuracy(ranks, 1, weights)}
    if count >= 5:
        values["top5"] = classification.accuracy(ranks, 5, weights)
    values["mean_per_class_recall"] = classification.mean_per_class_recall(ranks, labels, count, weights)
    return values
