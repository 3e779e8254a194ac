"""NLVR's scenes for FLAVA's demonstration: what people said truly of a scene is its caption.

    pairs_train.json, pairs_test.json       [{"image", "caption"}]: scenes, each with a sentence that is true of it
    scenes_train.json, scenes_test.json     [{"image"}]: every scene
    texts_train.json, texts_test.json       [{"text"}]: every sentence, true or false
    matches_test.json                       [{"image", "text", "label"}]: the test pairs, and as many with a sentence of
                                            another pair; a few of those happen to be true as well
    images/…                                48 × 48 pixels: the three boxes of a scene, the fourth corner empty

NLVR's examples share 254 sentences, so that unseen scenes alone would say little. Here a quarter of the sentences is
held out, whatever colours they name: training has none of the scenes that these were written for, nor any other scene
with the same boxes in another order or colouring. Training scenes come in `COLOURINGS` of the six colourings.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.convert.writer import new_folder
from vlm.demo import nlvr, visual_words
from vlm.demo.digits import matches
from vlm.demo.prepare import png

COLOURINGS = 2
HELD_OUT = 0.25


def sources(folder: str, split: str) -> dict[str, list[dict[str, Any]]]:
    """The sources of each stream of data, of the "train" or the "test" split, in `prepare_pairs`'s folder."""
    names = {"pairs": ("pairs", {"image": "image", "text": "caption"})}
    names |= {"images": ("scenes", {"image": "image"}), "text": ("texts", {"text": "text"})}
    return {
        stream: [{"kind": "json", "path": f"{folder}/{name}_{split}.json", "fields": fields}]
        for stream, (name, fields) in names.items()
    }


def prepare_pairs(source: str | os.PathLike, folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the folder, whole or not at all; a folder that is there already is left as it is. Returns it.

    Raises:
        UserError: `source` lacks the two archives of scenes.
    """
    train, test = nlvr.archives(source)
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        (draft / "images").mkdir(parents=True)
        rng = np.random.default_rng((seed, 4))
        rows, unseen = divide(nlvr.examples(train), nlvr.examples(test), rng)
        _write(draft, "train", [change for row in rows for change in _recoloured(row, rng)])
        pairs = _write(draft, "test", unseen)
        _write_json(draft / "matches_test.json", matches(pairs, rng))
    return folder


def divide(
    train: Iterable[nlvr.Example], test: Iterable[nlvr.Example], rng: np.random.Generator
) -> tuple[list[nlvr.Example], list[nlvr.Example]]:
    """Training examples, and examples whose sentences and boxes they do not have, in whatever colours."""
    train, test = list(train), list(test)
    forms = sorted({form(row.text) for row in [*train, *test]})
    held_out = set(rng.permutation(forms)[: round(HELD_OUT * len(forms))].tolist())
    unseen = [row for row in test if form(row.text) in held_out]
    shapes = {boxes(row.pixels) for row in unseen}
    kept = [row for row in train if form(row.text) not in held_out and boxes(row.pixels) not in shapes]
    return kept, unseen


def form(text: str) -> str:
    """A sentence without its colours."""
    return re.sub("|".join(nlvr.COLORS), "*", nlvr.plain(text))


def boxes(pixels: np.ndarray) -> tuple[bytes, ...]:
    """What the three boxes of a scene uint8[100, 400, 3] have in all colourings, in whatever order they stand.

    Every fifth pixel is looked at: the smallest objects are ten pixels wide.
    """
    seen = pixels[::5, ::5]
    drawn = np.zeros(seen.shape[:2], np.uint8)
    for number, rgb in enumerate(nlvr.COLORS.values()):
        drawn[(seen == rgb).all(-1)] = number + 1
    starts, width = (0, nlvr.STRIDE // 5, 2 * nlvr.STRIDE // 5), nlvr.SIDE // 5
    changed = (np.array([0, *change], np.uint8)[drawn] for change in itertools.permutations((1, 2, 3)))
    return min(tuple(sorted(each[:, start : start + width].tobytes() for start in starts)) for each in changed)


def texts(folder: Path) -> list[str]:
    """The sentences that training reads."""
    return [row["text"] for row in json.loads((folder / "texts_train.json").read_text(encoding="utf-8"))]


def _recoloured(row: nlvr.Example, rng: np.random.Generator) -> list[nlvr.Example]:
    every = list(nlvr.colourings())
    chosen = rng.choice(len(every), COLOURINGS, replace=False)
    return [nlvr.Example(*nlvr.recolour(row.pixels, row.text, every[index]), row.label) for index in chosen]


def _write(folder: Path, name: str, rows: Sequence[nlvr.Example]) -> list[dict[str, Any]]:
    """Writes pictures and lists of one split; returns its pairs."""
    pairs, every = [], []
    for number, row in enumerate(rows):
        image = f"images/{name}_{number:05d}.png"
        canvas = Image.fromarray(nlvr.arrange(row.pixels)).resize(
            (visual_words.SIDE, visual_words.SIDE), Image.Resampling.BOX
        )
        (folder / image).write_bytes(png(np.asarray(canvas)))
        every.append({"image": image})
        if row.label:
            pairs.append({"image": image, "caption": row.text if name == "train" else [row.text]})
    _write_json(folder / f"pairs_{name}.json", pairs)
    _write_json(folder / f"scenes_{name}.json", every)
    _write_json(folder / f"texts_{name}.json", [{"text": row.text} for row in rows])
    return pairs


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
