"""NLVR2 (Suhr et al. 2019): accuracy over sentence-and-image-pair examples, consistency over sentences."""

from __future__ import annotations

from collections.abc import Mapping

from vlm.errors import UserError


def score(
    predictions: Mapping[str, bool], labels: Mapping[str, bool], sentences: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Returns `accuracy` and `consistency`, the share of sentences that are judged right with every pair of images.

    Args:
      predictions, labels: {identifier: is the sentence true}. Every example needs a prediction.
      sentences: {identifier: what names its sentence}; None: identifiers are split-set-pair-sentence, as in
        `dev-850-0-0`, and examples that differ in the pair only have the same sentence.

    Raises:
      UserError: no examples, an example without prediction, or an identifier of another form.
    """
    missing = [name for name in labels if name not in predictions]
    if missing or not labels:
        raise UserError(f"predictions: none for {missing[0]!r}" if missing else "labels: nothing to score")
    correct = 0
    consistent: dict[str, bool] = {}
    for name, label in labels.items():
        right = predictions[name] == label
        correct += right
        key = sentence(name) if sentences is None else sentences[name]
        consistent[key] = consistent.get(key, True) and right
    return {"accuracy": correct / len(labels), "consistency": sum(consistent.values()) / len(consistent)}


def sentence(identifier: str) -> str:
    """The part of an identifier that names the sentence; raises UserError where it has no pair number."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise UserError(f"NLVR2 identifier: expected split-set-pair-sentence, found {identifier!r}")
    return "-".join([*parts[:2], "", *parts[3:]])
