"""ROUGE-L (Lin 2004) as the COCO caption evaluation computes it: beta 1.2, best precision and best recall apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

BETA = 1.2


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " i"]:
    """ROUGE-L of every image; the corpus' is their mean.

    Precision and recall of the longest common subsequence are each the largest over the references, which need not be
    the same reference. Words are what stands between single spaces, so an empty caption is one empty word.

    Args:
      hypotheses: [I] tokenised captions.
      references: [I] each image's tokenised references, at least one.
    """
    scores = np.zeros(len(hypotheses))
    for i, (hypothesis, row) in enumerate(zip(hypotheses, references, strict=True)):
        words = hypothesis.split(" ")
        others = [reference.split(" ") for reference in row]
        common = [common_subsequence(words, other) for other in others]
        precision = max(common) / len(words)
        recall = max(length / len(other) for length, other in zip(common, others, strict=True))
        if precision and recall:
            scores[i] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine word per word of `first` (Hyyrö 2004)."""
    where: dict[str, int] = {}
    for place, word in enumerate(second):
        where[word] = where.get(word, 0) | 1 << place
    every = (1 << len(second)) - 1
    free = every
    for word in first:
        match = free & where.get(word, 0)
        free = ((free + match) | (free - match)) & every
    return len(second) - free.bit_count()
