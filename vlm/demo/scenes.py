"""Scenes of two handwritten digits, with captions, questions and answers, in the files that BLIP's authors publish.

    images/train_00000.png …                       24 × 24 pixels: one scan on the left, one on the right
    caption_train.json, caption_test.json          [{"image", "caption", "image_id"}], test captions as lists
    caption_test_gt.json                           the test captions as COCO annotations
    vqa_train.json, vqa_test.json                  [{"question_id", "question", "answer": [...], "image", "dataset"}]
    answer_list.json                               every answer
    tokenizer/vocab.txt                            the words, after BERT's special tokens

Training scenes are made of the scans that `prepare` trains on, test scenes of those it tests on: no writer's digit is
in both. Answers are what one person would say ten times, as VQA's accuracy wants ten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm.convert.writer import new_folder
from vlm.demo.prepare import load_scans, png, split

SIZE, SCAN, STEP = 24, 8, 4
SCENES = {"train": 12_000, "test": 500}
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
PROMPT = "a picture of "
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
QUESTIONS_PER_SCENE = 3


def prepare_scenes(folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the folder, whole or not at all; a folder that is there already is left as it is. Returns it."""
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        (draft / "images").mkdir(parents=True)
        scans, labels = load_scans()
        for number, (name, rows) in enumerate(split(labels, seed).items()):
            _write_split(draft, name, scans[rows], labels[rows], np.random.default_rng((seed, 2, number)))
        _write_json(draft / "answer_list.json", [*NUMBERS, "yes", "no"])
        (draft / "tokenizer").mkdir()
        (draft / "tokenizer" / "vocab.txt").write_text("\n".join([*vocabulary(), ""]), encoding="utf-8")
    return folder


def caption(left: int, right: int) -> str:
    """What a scene shows."""
    return f"{article(left)} {NUMBERS[left]} on the left and {article(right)} {NUMBERS[right]} on the right"


def article(digit: int) -> str:
    """The indefinite article of a digit's name."""
    return "an" if digit == 8 else "a"


def questions(left: int, right: int, named: int) -> list[tuple[str, str]]:
    """Questions about a scene and their answers; `named` is the digit that one of them asks for."""
    yes = {True: "yes", False: "no"}
    return [
        ("which digit is on the left?", NUMBERS[left]),
        ("which digit is on the right?", NUMBERS[right]),
        ("which digit is larger?", NUMBERS[max(left, right)]),
        ("what is the sum of the digits?", NUMBERS[left + right]),
        ("are the digits equal?", yes[left == right]),
        (f"is there {article(named)} {NUMBERS[named]}?", yes[named in (left, right)]),
    ]


def scene(left: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two scans uint8[8, 8] on white paper uint8[24, 24], one somewhere in the left half and one in the right half.

    Places are multiples of four pixels: small image encoders learn to read sooner what their patches cut alike.
    """
    paper = np.full((SIZE, SIZE), 255, np.uint8)
    for half, scan in enumerate((left, right)):
        column = half * SIZE // 2 + STEP * rng.integers(0, (SIZE // 2 - SCAN) // STEP + 1)
        row = STEP * rng.integers(0, (SIZE - SCAN) // STEP + 1)
        paper[row : row + SCAN, column : column + SCAN] = scan
    return paper


def vary(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A training scan uint8[8, 8] with paler or darker ink and some noise: there are few, and each is seen often."""
    ink = (255.0 - scan) * rng.uniform(0.75, 1.25) + rng.normal(0.0, 16.0, scan.shape)
    return (255.0 - np.clip(ink, 0.0, 255.0)).astype(np.uint8)


def vocabulary() -> list[str]:
    """BERT's special tokens, then every word and mark that captions, questions and answers need."""
    texts = [PROMPT, *NUMBERS]
    for left in range(10):
        for right in range(10):
            texts += [caption(left, right), *(part for pair in questions(left, right, left) for part in pair)]
    return [*SPECIAL, *sorted({word for text in texts for word in text.replace("?", " ? ").split()})]


def _write_split(folder: Path, name: str, scans: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    captions: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for number, (left, right) in enumerate(_pairs(labels, SCENES[name], rng)):
        image = f"images/{name}_{number:05d}.png"
        pair = [scans[left], scans[right]]
        drawn = [vary(scan, rng) for scan in pair] if name == "train" else pair
        (folder / image).write_bytes(png(scene(drawn[0], drawn[1], rng)))
        digits = int(labels[left]), int(labels[right])
        text = caption(*digits)
        captions.append({"image": image, "caption": text if name == "train" else [text], "image_id": number})
        every = questions(*digits, _named(digits, rng))
        for choice in sorted(rng.choice(len(every), QUESTIONS_PER_SCENE, replace=False)):
            question, answer = every[choice]
            row = {"question_id": len(asked), "question": question, "answer": [answer] * 10, "image": image}
            asked.append(row | {"dataset": "vqa"})
    _write_json(folder / f"caption_{name}.json", captions)
    _write_json(folder / f"vqa_{name}.json", asked)
    if name == "test":
        images = [{"id": row["image_id"]} for row in captions]
        rows = [{"id": i, "image_id": row["image_id"], "caption": row["caption"][0]} for i, row in enumerate(captions)]
        _write_json(folder / f"caption_{name}_gt.json", {"images": images, "annotations": rows})


def _pairs(labels: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Rows of `labels`; both digits are drawn evenly, so that no pair of digits is rarer than chance makes it."""
    rows = [np.flatnonzero(labels == digit) for digit in range(10)]
    for left, right in rng.integers(0, 10, (count, 2)):
        yield int(rng.choice(rows[left])), int(rng.choice(rows[right]))


def _named(digits: tuple[int, int], rng: np.random.Generator) -> int:
    """A digit of the scene or, as often, one that is not in it."""
    if rng.random() < 0.5:
        return int(rng.choice(digits))
    return int(rng.choice([digit for digit in range(10) if digit not in digits]))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
