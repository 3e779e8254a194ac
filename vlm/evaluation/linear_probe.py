"""Linear probe: logistic regression on frozen image embeddings, its penalty chosen on a validation part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from vlm.data.source import Source
from vlm.errors import UserError
from vlm.evaluation import classification, logistic
from vlm.evaluation.embed import Advance, Embedder
from vlm.evaluation.evaluator import Result, Sampling, class_number, first_note, open_data


@dataclasses.dataclass(frozen=True)
class LinearProbeConfig:
    """Settings of one linear probe.

    Attributes:
      train, data: sources to fit on and to test on, whose examples have an image and an integer label.
      label: the field with the class number.
      penalty: of the squared kernel (scikit-learn's 1 / C); None sweeps it and then fits again on all of `train`.
      validation: share of `train` that the sweep is judged on (every n-th example).
      solver: "lbfgs" is optax's; "sklearn" scikit-learn's (extra `probe`).
    """

    train: dict[str, Any]
    data: dict[str, Any]
    label: str = "label"
    penalty: float | None = None
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

    @classmethod
    def prepare(cls, config: LinearProbeConfig, path: str, limit: int | None = None) -> LinearProbe:
        """Opens both sources and looks at their first labels.

        Raises:
          UserError: one of them is wrong, or scikit-learn is asked for and not installed.
        """
        if config.solver == "sklearn":
            try:
                import sklearn  # noqa: F401
            except ImportError:
                raise UserError(f"{path}.solver: 'sklearn' needs scikit-learn: pip install 'vlm[probe]'") from None
        train = open_data(config.train, f"{path}.train", limit)
        task = cls(config, train, open_data(config.data, f"{path}.data", limit))
        for source in (task.train, task.source):
            first_note(source, task._note)
        return task

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.train) + len(self.source)

    @property
    def uses_text(self) -> bool:
        """Whether the model's text tower is needed."""
        return False

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Embeds both parts, fits, and classifies the test part."""
        features, notes = embedder.all_images(self.train, self._note, advance)
        further = None if advance is None else lambda done: advance(len(self.train) + done)
        test_features, test_notes = embedder.all_images(self.source, self._note, further)
        labels, test_labels = (np.array([note["label"] for note in part]) for part in (notes, test_notes))
        count = int(max(labels.max(), test_labels.max())) + 1
        penalty, looked_at = self.config.penalty, {}
        if penalty is None:
            penalty, looked_at = self._sweep(features, labels, count)
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
            "train_examples": len(notes),
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

    def _sweep(self, features: np.ndarray, labels: np.ndarray, count: int) -> tuple[float, dict[float, float]]:
        # Every n-th example, so that a source sorted by class is split within each class.
        step = max(2, round(1 / self.config.validation))
        held_out = np.arange(len(labels)) % step == step - 1
        if not held_out.any():
            raise UserError(f"linear probe: expected at least {step} training images for a sweep, found {len(labels)}")

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
