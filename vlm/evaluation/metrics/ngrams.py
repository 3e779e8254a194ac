"""Counts of the n-grams of many sentences at once: what BLEU and CIDEr are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

MAX_N = 4


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often which n-gram, of one n, stands in which sentence; ordered by sentence, then by gram.

    Attributes:
      sentence, gram, count: [K], one entry per distinct n-gram of a sentence.
      num_grams: n-grams are numbered 0 … num_grams - 1.
      totals: [S], n-grams of each sentence, repetitions included.
    """

    sentence: Int[np.ndarray, " k"]
    gram: Int[np.ndarray, " k"]
    count: Int[np.ndarray, " k"]
    num_grams: int
    totals: Int[np.ndarray, " s"]


def count_ngrams(sentences: Sequence[str]) -> tuple[Counts, ...]:
    """Returns the counts for n = 1 … 4; words are what stands between white space."""
    number: dict[str, int] = {}
    words = [[number.setdefault(word, len(number)) for word in sentence.split()] for sentence in sentences]
    length = np.array([len(row) for row in words], np.int64)
    tokens = np.array([token for row in words for token in row], np.int64)
    sentence = np.repeat(np.arange(len(words)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(tokens))  # words from here to the sentence's end
    gram, num_grams, found = tokens, max(len(number), 1), []
    for n in range(1, MAX_N + 1):
        if n > 1:  # an n-gram is the (n-1)-gram that starts at the same word, and one word more
            at = np.flatnonzero(left >= n)
            known, gram_at = np.unique(gram[at] * max(len(number), 1) + tokens[at + n - 1], return_inverse=True)
            gram = np.zeros(len(gram), np.int64)
            gram[at], num_grams = gram_at, max(len(known), 1)
        at = np.flatnonzero(left >= n)
        pairs, count = np.unique(sentence[at] * num_grams + gram[at], return_counts=True)
        found.append(
            Counts(pairs // num_grams, pairs % num_grams, count, num_grams, np.maximum(length - n + 1, 0)),
        )
    return tuple(found)
