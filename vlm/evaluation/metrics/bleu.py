"""BLEU 1 to 4 (Papineni et al. 2002) as the COCO caption evaluation computes it: corpus level, closest reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vlm.evaluation.metrics.ngrams import MAX_N, count_ngrams

# The official constants: a precision of nothing is almost 0, never 0/0.
TINY, SMALL = 1e-15, 1e-9


def bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Float[np.ndarray, " 4"], Float[np.ndarray, "4 i"]]:
    """BLEU-1 … BLEU-4 of the corpus and of every image.

    The brevity penalty compares with the reference whose length is closest, the shorter one of two equally close.

    Args:
      hypotheses: [I] tokenised captions, words separated by spaces.
      references: [I] each image's tokenised references, at least one.
    """
    images = len(hypotheses)
    owner = np.concatenate([np.arange(images), np.repeat(np.arange(images), [len(row) for row in references])])
    counts = count_ngrams([*hypotheses, *(reference for row in references for reference in row)])
    words = counts[0].totals
    closest = _closest(words[:images], words[images:], owner[images:])
    correct, guess = np.zeros((MAX_N, images)), np.zeros((MAX_N, images))
    for n, found in enumerate(counts):
        is_hypothesis = found.sentence < images
        pair = owner[found.sentence] * found.num_grams + found.gram
        known, best = _largest(pair[~is_hypothesis], found.count[~is_hypothesis])
        mine = pair[is_hypothesis]
        place = np.minimum(np.searchsorted(known, mine), max(len(known) - 1, 0))
        allowed = np.where(known[place] == mine, best[place], 0) if len(known) else np.zeros(len(mine), np.int64)
        hits = np.minimum(found.count[is_hypothesis], allowed)
        correct[n] = np.bincount(found.sentence[is_hypothesis], weights=hits, minlength=images)
        guess[n] = found.totals[:images]
    corpus = _score(correct.sum(axis=1, keepdims=True), guess.sum(axis=1, keepdims=True), closest.sum(keepdims=True))
    return corpus[:, 0], _score(correct, guess, closest)


def _closest(words: np.ndarray, reference_words: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Length of each image's closest reference."""
    order = np.lexsort((reference_words, np.abs(reference_words - words[owner]), owner))
    first = np.searchsorted(owner[order], np.arange(len(words)))
    return reference_words[order][first]


def _largest(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys in order, and the largest value of each."""
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    last = np.flatnonzero(np.append(keys[1:] != keys[:-1], len(keys) > 0))
    return keys[last], values[last]


def _score(correct: np.ndarray, guess: np.ndarray, closest: np.ndarray) -> np.ndarray:
    precision = np.cumprod((correct + TINY) / (guess + SMALL), axis=0)
    score = precision ** (1 / np.arange(1, MAX_N + 1))[:, None]
    ratio = (guess[0] + TINY) / (closest + SMALL)
    return score * np.exp(np.minimum(0.0, 1 - 1 / ratio))[None, :]
