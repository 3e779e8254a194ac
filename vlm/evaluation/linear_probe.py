"""Linear probe: logistic regression on frozen image features, its penalty chosen on a validation part.

The protocol of CLIP (Radford et al. 2021, appendix A.3) and FLAVA (Singh et al. 2022): at most 1,000 iterations of
L-BFGS, penalties from 1e-6 to 1e6, and a last fit on training and validation part together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from vlm.data.source import Source
from vlm.errors import UserError
from vlm.evaluation import classification, logistic
from vlm.evaluation.embed import Advance, Embedder, Features
from vlm.evaluation.evaluator import Result, Sampling, class_number, first_note, open_data
from vlm.evaluation.feed import Note


@dataclasses.dataclass(frozen=True)
class LinearProbeConfig:
    """Settings of one linear probe.

    Attributes:
      train, data: sources to fit on and to test on, whose examples have an image and an integer label.
      label: the field with the class number.
      features: "embedding", the unit vector in the joint space, or "class_token", the last state of the image encoder's
        class token (as the FLAVA paper does).
      penalty: of the squared kernel (scikit-learn's 1 / C); None sweeps it and then fits again on all there is to fit.
      validation_data: a source that the sweep is judged on, where the data set has such a part; else
      validation: share of `train` that it is judged on (every n-th example, class by class).
      solver: "lbfgs" is optax's; "sklearn" scikit-learn's (extra `probe`).
    """

    train: dict[str, Any]
    data: dict[str, Any]
    label: str = "label"
    features: Features = "embedding"
    penalty: float | None = None
    validation_data: dict[str, Any] | None = None
    validation: float = 0.2
    solver: Literal["lbfgs", "sklearn"] = "lbfgs"
    max_iterations: int = 1000
    bootstrap: Sampling = Sampling()

    def __post_init__(self) -> None:
        if self.penalty is not None and self.penalty <= 0:
            raise ValueError(f"penalty: expected a positive number, found {self.penalty}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation: expected a share between 0 and 1, found {self.validation}")


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A prepared linear probe."""

    config: LinearProbeConfig
    train: Source
    source: Source
    validation: Source | None = None

    @classmethod
    def prepare(cls, config: LinearProbeConfig, path: str, limit: int | None = None) -> LinearProbe:
        """Opens the sources and looks at their first labels.

        Raises:
          UserError: one of them is wrong, or scikit-learn is asked for and not installed.
        """
        if config.solver == "sklearn":
            try:
                import sklearn  # noqa: F401
            except ImportError:
                raise UserError(f"{path}.solver: 'sklearn' needs scikit-learn: pip install 'vlm[probe]'") from None
        train = open_data(config.train, f"{path}.train", limit)
        validation = None
        if config.validation_data is not None:
            validation = open_data(config.validation_data, f"{path}.validation_data", limit)
        task = cls(config, train, open_data(config.data, f"{path}.data", limit), validation)
        for source in task._sources:
            first_note(source, task._note)
        return task

    @property
    def _sources(self) -> list[Source]:
        return [source for source in (self.train, self.validation, self.source) if source is not None]

    @property
    def size(self) -> int:
        """Number of images."""
        return sum(map(len, self._sources))

    @property
    def uses_text(self) -> bool:
        """Whether the model's text tower is needed."""
        return False

    def check(self, embedder: Embedder) -> None:
        """Traces the model; raises UserError where it has no such features."""
        embedder.check(texts=False, features=self.config.features)

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Embeds all parts, fits, and classifies the test part."""
        parts: list[tuple[np.ndarray, list[Note]]] = []
        done = 0
        for source in self._sources:
            further = None if advance is None else functools.partial(_shifted, advance, done)
            parts.append(embedder.all_images(source, self._note, further, features=self.config.features))
            done += len(source)
        (test_features, test_notes), fitted = parts[-1], parts[:-1]
        features, notes = np.concatenate([part for part, _ in fitted]), [note for _, part in fitted for note in part]
        labels, test_labels = (np.array([note["label"] for note in part]) for part in (notes, test_notes))
        count = int(max(labels.max(), test_labels.max())) + 1
        penalty, looked_at = self.config.penalty, {}
        if penalty is None:
            held_out = self._held_out(labels) if self.validation is None else _after(len(fitted[0][1]), len(labels))
            penalty, looked_at = self._sweep(features, labels, count, held_out)
        kernel, bias = self._fit(features, labels, count, penalty)
        scores = test_features @ kernel + bias
        ranks = classification.label_ranks(scores, test_labels)

        def metrics(weights: np.ndarray | None) -> dict[str, float]:
            recall = classification.mean_per_class_recall(ranks, test_labels, count, weights)
            return {"top1": classification.accuracy(ranks, 1, weights), "mean_per_class_recall": recall}

        details = {
            "penalty": penalty,
            "sweep": {f"{value:.6g}": score for value, score in looked_at.items()},
            "solver": self.config.solver,
            "features": self.config.features,
            "train_examples": len(notes),
            "classes": count,
            "data_fingerprint": self.source.fingerprint,
            "train_fingerprint": self.train.fingerprint,
        }
        predictions = np.argmax(scores, axis=1)
        return Result(
            "linear_probe",
            metrics(None),
            self.config.bootstrap.intervals(metrics, len(test_notes)),
            n=len(test_notes),
            unreadable=self.size - len(notes) - len(test_notes),
            details=details,
            examples=[
                {**note, "prediction": int(best), "correct": bool(best == note["label"])}
                for note, best in zip(test_notes, predictions, strict=True)
            ],
        )

    def _held_out(self, labels: np.ndarray) -> np.ndarray:
        # Counted class by class: where classes take turns, every n-th example would be of the same few.
        step, held_out = max(2, round(1 / self.config.validation)), np.zeros(len(labels), bool)
        held_out[np.argsort(labels, kind="stable")[step - 1 :: step]] = True
        if not held_out.any():
            raise UserError(f"linear probe: expected at least {step} training images for a sweep, found {len(labels)}")
        return held_out

    def _sweep(
        self, features: np.ndarray, labels: np.ndarray, count: int, held_out: np.ndarray
    ) -> tuple[float, dict[float, float]]:
        def score(penalty: float) -> float:
            kernel, bias = self._fit(features[~held_out], labels[~held_out], count, penalty)
            predictions = np.argmax(features[held_out] @ kernel + bias, axis=1)
            return float(np.mean(predictions == labels[held_out]))

        return logistic.sweep(score)

    def _fit(self, features: np.ndarray, labels: np.ndarray, count: int, penalty: float) -> logistic.Weights:
        solvers: dict[str, Callable[..., logistic.Weights]] = {
            "lbfgs": logistic.fit,
            "sklearn": logistic.fit_sklearn,
        }
        fit = functools.partial(solvers[self.config.solver], max_iterations=self.config.max_iterations)
        return fit(features, labels, count, penalty)

    def _note(self, example: Mapping[str, Any]) -> dict[str, Any]:
        label = class_number(example, self.config.label)
        return {"key": str(example.get("key")), "label": label}


def _after(first: int, count: int) -> np.ndarray:
    return np.arange(count) >= first


def _shifted(advance: Advance, before: int, done: int) -> None:
    advance(before + done)
