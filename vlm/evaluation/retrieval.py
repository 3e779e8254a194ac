"""Metrics of retrieval between images and texts, as pure functions of NumPy arrays.

Every text belongs to one image, an image may have several texts; or images and texts belong together in groups. Equal
similarities count against the query: a wrong item that is as similar as the right one is placed before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

CHUNK_BYTES = 64 << 20
_TIE = 1e-12  # similarities are computed in float64: whatever is nearer than this came from equal embeddings


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the right items were found; 0 is the first place.

    Attributes:
      text_to_image: [T], place of a text's image among all images.
      image_to_text: [I], place of the best of an image's texts among all texts (the others of its own do not count).
      own_texts: [T], place of every text in the list that its own image retrieves; None for groups.
      text_image: [T], the image of every text.
    """

    text_to_image: Int[np.ndarray, " t"]
    image_to_text: Int[np.ndarray, " i"]
    own_texts: Int[np.ndarray, " t"] | None
    text_image: Int[np.ndarray, " t"]


def ranks(
    image_embeds: Float[np.ndarray, "i d"], text_embeds: Float[np.ndarray, "t d"], text_image: Int[np.ndarray, " t"]
) -> Ranks:
    """Ranks by inner product, a chunk of images at a time; memory is O(chunk), whatever I · T.

    Raises:
      ValueError: an embedding is not finite, `text_image` does not name images, or an image has no text.
    """
    num_images, num_texts = len(image_embeds), len(text_embeds)
    _check(image_embeds, text_embeds, text_image)
    texts = np.ascontiguousarray(text_embeds.T, dtype=np.float64)
    order = np.argsort(text_image, kind="stable")
    bounds = np.searchsorted(text_image[order], np.arange(num_images + 1))
    ahead_of_image = np.zeros(num_texts, np.int64)
    image_to_text = np.empty(num_images, np.int64)
    own_texts = np.empty(num_texts, np.int64)
    right = _pairwise(image_embeds, text_embeds, text_image) - _TIE
    rows = max(1, CHUNK_BYTES // (8 * max(num_texts, 1)))
    for start in range(0, num_images, rows):
        similarity = np.asarray(image_embeds[start : start + rows], np.float64) @ texts
        ahead_of_image += np.count_nonzero(similarity >= right[None, :], axis=0)
        for row, values in enumerate(similarity, start):
            own = order[bounds[row] : bounds[row + 1]]
            image_to_text[row], own_texts[own] = _own_places(values, own)
    ahead_of_image -= 1  # a text's own image is not ahead of itself
    return Ranks(ahead_of_image, image_to_text, own_texts, text_image)


def group_ranks(
    image_embeds: Float[np.ndarray, "i d"],
    text_embeds: Float[np.ndarray, "t d"],
    text_image: Int[np.ndarray, " t"],
    image_group: Int[np.ndarray, " i"],
) -> Ranks:
    """As `ranks` where an image is right for every text of its group: the best of the right ones counts.

    Args:
      text_image: the image that each text came with; its group is the text's.
      image_group: number of each image's group.
    """
    _check(image_embeds, text_embeds, text_image)
    texts, text_group = np.ascontiguousarray(text_embeds.T, dtype=np.float64), image_group[text_image]
    rows = max(1, CHUNK_BYTES // (8 * len(text_embeds)))
    best = np.full(len(text_embeds), -np.inf)
    ahead_of_image, image_to_text = np.zeros(len(best), np.int64), np.empty(len(image_embeds), np.int64)
    for counting in (False, True):
        for start in range(0, len(image_embeds), rows):
            part = slice(start, start + rows)
            similarity = np.asarray(image_embeds[part], np.float64) @ texts
            right = image_group[part, None] == text_group[None, :]
            if counting:
                ahead_of_image += (~right & (similarity >= best[None, :] - _TIE)).sum(axis=0)
                continue
            own = np.where(right, similarity, -np.inf)
            best = np.maximum(best, own.max(axis=0))
            image_to_text[part] = (~right & (similarity >= own.max(axis=1, keepdims=True) - _TIE)).sum(axis=1)
    return Ranks(ahead_of_image, image_to_text, None, text_image)


def score_ranks(
    image_to_text: Float[np.ndarray, "i t"], text_to_image: Float[np.ndarray, "n m"], text_image: Int[np.ndarray, " t"]
) -> Ranks:
    """Ranks by given scores, which may differ by direction: a shortlist of each query's best is scored anew.

    What is not on a shortlist has one score below all others, and is placed last.

    Raises:
      ValueError: the shapes do not fit, a score is NaN, `text_image` does not name images, or an image has no text.
    """
    images, texts = image_to_text.shape
    if text_to_image.shape != (texts, images):
        raise ValueError(f"scores: expected [{texts}, {images}] from texts to images, found {text_to_image.shape}")
    if np.isnan(image_to_text).any() or np.isnan(text_to_image).any():
        raise ValueError("scores: expected numbers, found NaN")
    _check(np.empty((images, 0)), np.empty((texts, 0)), text_image)
    order = np.argsort(text_image, kind="stable")
    bounds = np.searchsorted(text_image[order], np.arange(images + 1))
    best, own_texts = np.empty(images, np.int64), np.empty(texts, np.int64)
    for row, values in enumerate(image_to_text):
        own = order[bounds[row] : bounds[row + 1]]
        best[row], own_texts[own] = _own_places(np.asarray(values, np.float64), own)
    right = text_to_image[np.arange(texts), text_image]
    ahead = np.array([np.count_nonzero(row >= value) for row, value in zip(text_to_image, right, strict=True)]) - 1
    return Ranks(ahead, best, own_texts, text_image)


def list_ranks(
    image_to_text: Sequence[Sequence[int]], text_to_image: Sequence[Sequence[int]], text_image: Int[np.ndarray, " t"]
) -> Ranks:
    """Ranks from lists of what each query found, best first; what a list lacks was not found at any place.

    Args:
      image_to_text: of every image, texts by number.
      text_to_image: of every text, images by number.
    """
    nowhere = np.iinfo(np.int64).max
    places = [{item: place for place, item in enumerate(row)} for row in text_to_image]
    found = np.array([row.get(int(image), nowhere) for row, image in zip(places, text_image, strict=True)], np.int64)
    own_texts = np.full(len(text_image), nowhere)
    best = np.full(len(image_to_text), nowhere)
    for image, row in enumerate(image_to_text):
        for place, text in enumerate(row):
            if text_image[text] == image:
                own_texts[text] = place
                best[image] = min(best[image], place)
    return Ranks(found, best, own_texts, text_image)


def recall(
    found: Ranks, ks: Sequence[int] = (1, 5, 10), image_weights: Float[np.ndarray, " i"] | None = None
) -> dict[str, float]:
    """Recall at k both ways, their mean, and the share of an image's texts among its first k.

    `text_to_image_recall@k` is the share of texts whose image is among the first k; `image_to_text_recall@k` of images
    that have at least one of their texts among the first k (CLIP's definition); `image_to_text_true_recall@k` the mean
    share of an image's texts among the first k. `mean_recall` is over both directions and all k.

    Args:
      image_weights: how often each image, with its texts, counts; for bootstrap.
    """
    weights = np.ones(len(found.image_to_text)) if image_weights is None else image_weights
    per_image = np.bincount(found.text_image, minlength=len(weights))
    metrics: dict[str, float] = {}
    for k in ks:
        hit = found.text_to_image < k
        metrics[f"text_to_image_recall@{k}"] = float(np.average(hit, weights=weights[found.text_image]))
    for k in ks:
        metrics[f"image_to_text_recall@{k}"] = float(np.average(found.image_to_text < k, weights=weights))
    metrics["mean_recall"] = float(np.mean(list(metrics.values())))
    if found.own_texts is None:
        return metrics
    for k in ks:
        among = np.bincount(found.text_image, weights=found.own_texts < k, minlength=len(weights)) / per_image
        metrics[f"image_to_text_true_recall@{k}"] = float(np.average(among, weights=weights))
    return metrics


def _own_places(values: np.ndarray, own: np.ndarray) -> tuple[int, np.ndarray]:
    """Place of the best own text among the others' texts, and the place of every own text in the whole list."""
    mine = values[own]
    ahead = np.array([np.count_nonzero(values >= value - _TIE) for value in mine])
    tied_or_better = (mine[None, :] >= mine[:, None] - _TIE).sum(axis=1)
    others_ahead = ahead - tied_or_better
    places = np.empty(len(own), np.int64)
    by_similarity = np.argsort(-mine, kind="stable")
    places[by_similarity] = np.arange(len(own))
    return int(others_ahead.min()), others_ahead + places


def _pairwise(image_embeds: np.ndarray, text_embeds: np.ndarray, text_image: np.ndarray) -> np.ndarray:
    right = np.empty(len(text_embeds))
    rows = max(1, CHUNK_BYTES // (16 * image_embeds.shape[1]))
    for start in range(0, len(text_embeds), rows):
        part = slice(start, start + rows)
        images = np.asarray(image_embeds[text_image[part]], np.float64)
        right[part] = np.einsum("td,td->t", images, np.asarray(text_embeds[part], np.float64))
    return right


def _check(image_embeds: np.ndarray, text_embeds: np.ndarray, text_image: np.ndarray) -> None:
    for name, embeds in (("image", image_embeds), ("text", text_embeds)):
        bad = ~np.isfinite(embeds).all(axis=1)
        if bad.any():
            raise ValueError(f"{name} embeddings: expected finite numbers, found {int(bad.sum())} rows with others")
    if len(text_image) != len(text_embeds):
        raise ValueError(f"text_image: expected one image per text ({len(text_embeds)}), found {len(text_image)}")
    present = np.zeros(len(image_embeds), bool)
    if len(text_image) and (text_image.min() < 0 or text_image.max() >= len(present)):
        raise ValueError(f"text_image: expected numbers of {len(present)} images, found {text_image.max()}")
    present[text_image] = True
    if not present.all():
        raise ValueError(
            f"text_image: {int((~present).sum())} images have no text, the first is {int(np.argmin(present))}"
        )
