"""Visual words without a trained codebook: the k-means clusters of small pictures' patches, and the words of texts.

visual_words            cache: the visual words of every patch of every picture
visual_words.npy        what they look like
tokenizer/vocab.txt     BERT's special tokens and the words of the texts
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from vlm.convert.writer import new_folder
from vlm.data.image import ImageSettings, open_image, process
from vlm.data.teacher_cache import write_cache

SIDE, PATCH = 48, 8
"""Pixels of pictures and of patches as the model sees them."""
COUNT = 128
FITTED = 10_000
MEANS = "visual_words.npy"


def patches(image: bytes, side: int = SIDE, patch: int = PATCH) -> UInt8[np.ndarray, "p f"]:
    """The patches of a picture scaled to `side` pixels, row by row, flattened as (row, column, channel)."""
    settings = ImageSettings(side, None, mode="exact")
    pixels = process(open_image(image, "image"), settings, normalise=False)
    grid = side // patch
    cut = pixels.reshape(grid, patch, grid, patch, -1).transpose(0, 2, 1, 3, 4)
    return cut.reshape(grid * grid, -1)


def fit(rows: UInt8[np.ndarray, "n f"], count: int = COUNT, seed: int = 0) -> Float[np.ndarray, "v f"]:
    """The mean patch of each cluster of patches, the most frequent cluster first."""
    from sklearn.cluster import KMeans

    clusters: Any = KMeans  # its annotation knows no number of starts
    means = clusters(count, n_init=1, random_state=seed).fit(rows.astype(np.float32)).cluster_centers_
    frequent = np.argsort(-np.bincount(nearest(rows, means), minlength=count), kind="stable")
    return means[frequent].astype(np.float32)


def nearest(rows: UInt8[np.ndarray, "n f"], means: Float[np.ndarray, "v f"]) -> Int[np.ndarray, " n"]:
    """The number of the mean that is nearest to each patch."""
    distances = (means**2).sum(1) - 2 * rows.astype(np.float32) @ means.T
    return distances.argmin(1)


def prepare_words(folder: str | os.PathLike, folders: Sequence[Path], vocabulary: Sequence[str], seed: int = 0) -> Path:
    """Writes the folder, whole or not at all; a folder that is there already is left as it is. Returns it.

    Args:
        folders: of pictures, `images/train_….png` and others. Every folder has the same share in the visual words,
            which are fitted to training pictures.
        vocabulary: of the texts.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        (draft / "tokenizer").mkdir(parents=True)
        (draft / "tokenizer" / "vocab.txt").write_text("\n".join([*vocabulary, ""]), encoding="utf-8")
        images = [_pictures(each) for each in folders]
        rng = np.random.default_rng(seed)
        means = fit(np.concatenate([_drawn(each, FITTED // len(folders), rng) for each in images]), seed=seed)
        np.save(draft / MEANS, means, allow_pickle=False)
        _write_cache(draft / "visual_words", [row for each in images for row in each.values()], means)
    return folder


def _pictures(folder: Path) -> dict[str, tuple[bytes, np.ndarray]]:
    """By file name the encoded pictures of a folder and their patches."""
    files = {path.name: path.read_bytes() for path in sorted((folder / "images").glob("*.png"))}
    return {name: (data, patches(data)) for name, data in files.items()}


def _drawn(images: dict[str, tuple[bytes, np.ndarray]], count: int, rng: np.random.Generator) -> np.ndarray:
    """Patches [N, F] of training pictures, `count` at the most."""
    rows = np.concatenate([rows for name, (_, rows) in images.items() if name.startswith("train_")])
    return rows[rng.permutation(len(rows))[:count]]


def _write_cache(folder: Path, images: Sequence[tuple[bytes, np.ndarray]], means: np.ndarray) -> None:
    digest = hashlib.sha256(means.tobytes()).hexdigest()

    def batches() -> Iterator[tuple[list[bytes], np.ndarray]]:
        for image, rows in dict(images).items():
            yield [image], nearest(rows, means)[None]

    write_cache(folder, batches(), teacher=f"codebook:{digest}", dtype="uint16", vocab_size=COUNT)


def read(folder: str | os.PathLike) -> UInt8[np.ndarray, "v h w c"]:
    """The mean patches as pictures."""
    means = np.load(Path(folder) / MEANS, allow_pickle=False)
    side = round((means.shape[1] / 3) ** 0.5)
    return np.clip(np.round(means), 0, 255).astype(np.uint8).reshape(-1, side, side, 3)
