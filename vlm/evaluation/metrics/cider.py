"""CIDEr (Vedantam et al. 2015) as the COCO caption evaluation computes it: the paper's CIDEr-D, times ten."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vlm.evaluation.metrics.ngrams import MAX_N, Counts, count_ngrams

SIGMA = 6.0


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " i"]:
    """CIDEr of every image; the corpus' is their mean.

    For n = 1 … 4 the tf-idf vectors of caption and reference are compared by their cosine, where a word counts at most
    as much as in the reference; a Gaussian of the difference in length, counted in bigrams as the official tool does,
    punishes; then the mean over n and over references, times ten. Document frequencies are those of the images given:
    a part of a data set scores differently, and a single image scores 0.

    Args:
      hypotheses: [I] tokenised captions, words separated by spaces.
      references: [I] each image's tokenised references, at least one.
    """
    images = len(hypotheses)
    per_image = np.array([len(row) for row in references], np.int64)
    owner = np.concatenate([np.arange(images), np.repeat(np.arange(images), per_image)])
    counts = count_ngrams([*hypotheses, *(reference for row in references for reference in row)])
    similarity = sum(_similarity(found, owner, images) for found in counts)
    bigrams = counts[1].totals
    difference = bigrams[images:] - bigrams[owner[images:]]
    similarity = similarity * np.exp(-(difference.astype(np.float64) ** 2) / (2 * SIGMA**2))
    summed = np.bincount(owner[images:], weights=similarity, minlength=images)
    return 10 * summed / MAX_N / per_image


def _similarity(found: Counts, owner: np.ndarray, images: int) -> np.ndarray:
    """[R], clipped cosine of every reference with its image's caption."""
    is_reference = found.sentence >= images
    pair = owner[found.sentence] * found.num_grams + found.gram
    documents = np.bincount(np.unique(pair[is_reference]) % found.num_grams, minlength=found.num_grams)
    weight = found.count * (np.log(images) - np.log(np.maximum(1, documents)))[found.gram]
    norm = np.sqrt(np.bincount(found.sentence, weights=weight**2, minlength=len(owner)))
    captions, captions_weight = pair[~is_reference], weight[~is_reference]  # ordered, as sentence and owner agree
    if not len(captions):
        return np.zeros(len(owner) - images)
    place = np.minimum(np.searchsorted(captions, pair[is_reference]), len(captions) - 1)
    theirs = np.where(captions[place] == pair[is_reference], captions_weight[place], 0.0)
    products = np.minimum(theirs, weight[is_reference]) * weight[is_reference]
    dot = np.bincount(found.sentence[is_reference] - images, weights=products, minlength=len(owner) - images)
    norms = norm[images:] * norm[owner[images:]]
    return np.divide(dot, norms, out=dot, where=norms != 0)
