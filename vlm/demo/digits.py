"""What FLAVA's demonstration reads beside the scenes of two digits, in one folder.

    images/train_00000.png …                 24 × 24 pixels: one scan, small or large, on white paper
    digits_train.json, digits_test.json      [{"image", "label", "scale", "caption"}]
    pairs_train.json, pairs_test.json        [{"image", "left", "right"}]: scenes and digits
    texts_train.json, texts_test.json        [{"text"}]: captions, and questions with their answers
    matches_test.json                        [{"image", "text", "label"}]: captions of test scenes, half wrong

Training pictures are made of the scans that `prepare` trains on, test pictures of those it tests on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.convert.writer import new_folder
from vlm.demo import scenes
from vlm.demo.prepare import load_scans, png, split

DIGITS = {"train": 4000, "test": 720}
SCALES = {1: "small", 2: "medium", 3: "large"}
"""How many times a scan's size it is drawn, and what its caption says of that."""
PROBED = 4000


def sources(folder: str, split: str) -> dict[str, list[dict[str, Any]]]:
    """The sources of each stream of data, of the "train" or the "test" split, below the demonstration's folder."""
    names = {"image": "image", "text": "caption"}
    single = {"kind": "json", "path": f"{folder}/flava/digits_{split}.json"}
    return {
        "pairs": [
            {"kind": "json", "path": f"{folder}/scenes/caption_{split}.json", "fields": names},
            {**single, "fields": names},
        ],
        "images": [{**single, "fields": {"image": "image"}}],
        "text": [{"kind": "json", "path": f"{folder}/flava/texts_{split}.json", "fields": {"text": "text"}}],
    }


def vocabulary() -> list[str]:
    """The words of `scenes`, and those for sizes."""
    return [*scenes.vocabulary(), *SCALES.values()]


def prepare_digits(scenes_folder: Path, folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the folder, whole or not at all; a folder that is there already is left as it is. Returns it."""
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        (draft / "images").mkdir(parents=True)
        scans, labels = load_scans()
        for number, (name, rows) in enumerate(split(labels, seed).items()):
            rng = np.random.default_rng((seed, 3, number))
            _write_digits(draft, name, scans[rows], labels[rows], rng)
            _write_json(draft / f"pairs_{name}.json", both_digits(_read(scenes_folder / f"caption_{name}.json")))
            _write_json(draft / f"texts_{name}.json", [{"text": text} for text in _texts(scenes_folder, name)])
        _write_json(draft / "matches_test.json", matches(_read(scenes_folder / "caption_test.json"), rng))
    return folder


def both_digits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scenes with their two digits as numbers, the first `PROBED` of them."""
    found = []
    for row in rows[:PROBED]:
        words = (row["caption"] if isinstance(row["caption"], str) else row["caption"][0]).split()
        left, right = (scenes.NUMBERS.index(words[place]) for place in (1, 7))
        found.append({"image": row["image"], "left": left, "right": right})
    return found


def matches(rows: Sequence[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Every scene with its caption, and once more with another scene's, unlike its own."""
    found = []
    for row in rows:
        own = row["caption"][0]
        others = [other["caption"][0] for other in rows if other["caption"][0] != own]
        for text, label in ((own, True), (str(rng.choice(others)), False)):
            found.append({"image": row["image"], "text": text, "label": label})
    return found


def _write_digits(folder: Path, name: str, scans: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    rows = []
    for number in range(DIGITS[name]):
        place = int(rng.integers(len(scans))) if name == "train" else number % len(scans)
        scan = scenes.vary(scans[place], rng) if name == "train" else scans[place]
        image = f"images/{name}_{number:05d}.png"
        paper, scale = _paper(scan, rng)
        (folder / image).write_bytes(png(paper))
        digit = int(labels[place])
        caption = f"a {SCALES[scale]} {scenes.NUMBERS[digit]}"
        rows.append({"image": image, "label": digit, "scale": scale, "caption": caption})
    _write_json(folder / f"digits_{name}.json", rows)


def _paper(scan: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A scan uint8[8, 8] on white paper uint8[24, 24], on `scenes.scene`'s grid, and how many times its size."""
    scale = int(rng.choice(list(SCALES)))
    paper, side = np.full((scenes.SIZE, scenes.SIZE), 255, np.uint8), scenes.SCAN * scale
    drawn = np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC))
    row, column = scenes.STEP * rng.integers(0, (scenes.SIZE - side) // scenes.STEP + 1, 2)
    paper[row : row + side, column : column + side] = drawn
    return paper, scale


def _texts(folder: Path, name: str) -> list[str]:
    captions = [row["caption"] for row in _read(folder / f"caption_{name}.json")]
    said = [scenes.PROMPT + (text if isinstance(text, str) else text[0]) for text in captions]
    asked = [f"{row['question']} {row['answer'][0]}" for row in _read(folder / f"vqa_{name}.json")]
    return said + asked[: len(said)]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
