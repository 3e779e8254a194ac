"""Visual words without a trained codebook: the k-means clusters of small pictures' patches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from vlm.data.image import ImageSettings, open_image, process
from vlm.data.teacher_cache import write_cache

COUNT = 64
FITTED = 50_000
MEANS = "visual_words.npy"


def patches(image: bytes, side: int, patch: int) -> UInt8[np.ndarray, "p f"]:
    """The patches of a picture scaled to `side` pixels, row by row, flattened as (row, column, channel)."""
    settings = ImageSettings(side, None, mode="exact")
    pixels = process(open_image(image, "image"), settings, normalise=False)
    grid = side // patch
    cut = pixels.reshape(grid, patch, grid, patch, -1).transpose(0, 2, 1, 3, 4)
    return cut.reshape(grid * grid, -1)


def fit(pictures: np.ndarray, count: int = COUNT, seed: int = 0) -> Float[np.ndarray, "v f"]:
    """The mean patch of each cluster, the most frequent cluster first.

    Args:
        pictures: patches uint8[N, P, F] of training pictures, of which `FITTED` are drawn.
    """
    from sklearn.cluster import KMeans

    rows = pictures.reshape(-1, pictures.shape[-1])
    drawn = np.random.default_rng(seed).permutation(len(rows))[:FITTED]
    clusters: Any = KMeans  # its annotation knows no number of starts
    means = clusters(count, n_init=1, random_state=seed).fit(rows[drawn].astype(np.float32)).cluster_centers_
    frequent = np.argsort(-np.bincount(nearest(rows[drawn], means), minlength=count), kind="stable")
    return means[frequent].astype(np.float32)


def nearest(rows: UInt8[np.ndarray, "n f"], means: Float[np.ndarray, "v f"]) -> Int[np.ndarray, " n"]:
    """The number of the mean that is nearest to each patch."""
    distances = (means**2).sum(1) - 2 * rows.astype(np.float32) @ means.T
    return distances.argmin(1)


def write(folder: Path, train: Iterable[Path], others: Iterable[Path], side: int, patch: int, seed: int = 0) -> None:
    """Fits the words to training pictures and writes the words of all pictures as a cache, `visual_words`.

    Beside it `visual_words.npy` keeps the mean patches float32[V, F].
    """
    train, images = list(train), {}
    for path in [*train, *others]:
        data = path.read_bytes()
        images[data] = patches(data, side, patch)
        if path == train[-1]:
            means = fit(np.stack(list(images.values())), seed=seed)
    np.save(folder / MEANS, means, allow_pickle=False)
    digest = hashlib.sha256(means.tobytes()).hexdigest()

    def batches() -> Iterator[tuple[list[bytes], np.ndarray]]:
        for image, rows in images.items():
            yield [image], nearest(rows, means)[None]

    write_cache(folder / "visual_words", batches(), teacher=f"codebook:{digest}", dtype="uint16", vocab_size=COUNT)


def read(folder: str | os.PathLike) -> UInt8[np.ndarray, "v h w c"]:
    """The mean patches as pictures."""
    means = np.load(Path(folder) / MEANS, allow_pickle=False)
    side = round((means.shape[1] / 3) ** 0.5)
    return np.clip(np.round(means), 0, 255).astype(np.uint8).reshape(-1, side, side, 3)
