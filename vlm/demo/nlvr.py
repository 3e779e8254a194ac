"""NLVR (Suhr et al. 2017): true or false sentences about three boxes of coloured shapes, made ready for BLIP.

    human.json, test.json          [{"image", "text", "label"}]: people's sentences; training ones in all six colourings
    statements.json                generated sentences about the training scenes, half of them true
    towers.json, simple.json       those about towers, and those of the simplest form: read first, they are the way in
    captions.json                  [{"image", "text"}]: what is in the boxes of the training scenes, generated
    images/…                       208 × 208 pixels: the three boxes of a scene, the fourth corner empty
    tokenizer/vocab.txt            the words of the training sentences, and letters for all others

There are only 600 human training examples (238 sentences), each with five arrangements of the same boxes: few for
learning to see and to read. So captions are bootstrapped, as BLIP does with web images, here by a program: it reads the
objects off the clean drawings (`parse`) and says what they are, or states something about them (`vlm.demo.statements`).

A sentence was written for four scenes, true of two of them. So the label that a sentence has in training foretells the
other one on held-out scenes: who guesses each sentence's majority is right about 31 % of those that have one.
`balanced` takes that away: every sentence is as often true as false, those that are only one are left out. Generated
ones are balanced too, so that nothing but the scene tells what is true.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.convert.writer import new_folder
from vlm.data.tar import TarSource
from vlm.demo.prepare import png
from vlm.demo.statements import description, statement
from vlm.errors import UserError

TRAIN, TEST, TEST_FROM = "nlvr_dev600_perm1to5.tar", "nlvr_dev_perm0.tar", 600
COLORS = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
GROUND, WALL = 211, 128
SIDE, STRIDE, CANVAS = 100, 150, 208
VOCABULARY = 256
SIZES = {"small": 10, "medium": 20, "big": 30}
SHARES = {
    "small": {"square": 1.0, "circle": 0.94, "triangle": 0.62},
    "medium": {"square": 1.0, "circle": 0.85, "triangle": 0.56},
    "big": {"square": 1.0, "circle": 0.73, "triangle": 0.54},
}
"""Share of the pixels around an object of each size that have its full colour; soft edges have not."""
STATEMENTS_PER_COLOURING = 6
PARTS = {
    "statements": r".*",
    "towers": r"(?!.*\b(most|box|boxes)\b).*\btowers?\b.*",
    "simple": r"there is a tower with a \w+ block at the (base|top)",
}
"""Files of generated sentences, by what they match."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Item(NamedTuple):
    """An object of a scene: what it looks like, where it is in its box (pixels, from the top left corner), and which
    walls it touches, of "t", "b", "l" and "r".
    """

    color: str
    shape: str
    size: str
    top: int
    left: int
    walls: str


class Example(NamedTuple):
    """A scene uint8[100, 400, 3], a sentence about it, and whether it is true."""

    pixels: np.ndarray
    text: str
    label: bool


def prepare_nlvr(source: str | os.PathLike, folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the folder, whole or not at all; a folder that is there already is left as it is. Returns it.

    Raises:
        UserError: `source` lacks the two archives of scenes.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    train, test = archives(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        (draft / "images").mkdir(parents=True)
        sentences = _write_train(draft, train, np.random.default_rng(seed))
        _write_test(draft, test)
        (draft / "tokenizer").mkdir()
        (draft / "tokenizer" / "vocab.txt").write_text("\n".join([*vocabulary(sentences), ""]), encoding="utf-8")
    return folder


def archives(source: str | os.PathLike) -> tuple[Path, Path]:
    """Where the archives `TRAIN` and `TEST` are.

    Raises:
        UserError: one of them is not in the folder.
    """
    for name in (TRAIN, TEST):
        if not (Path(source) / name).is_file():
            raise UserError(f"{source}: expected NLVR's scenes in {TRAIN} and {TEST}, found no {name}")
    return Path(source) / TRAIN, Path(source) / TEST


def examples(archive: Path) -> Iterator[Example]:
    """The scenes of an archive with their sentences."""
    fields = {"image": "png", "text": "json/sentence", "label": "json/label"}
    source = TarSource(str(archive), fields=fields)
    for index in range(len(source)):
        row = source[index]
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
        yield Example(pixels, row["text"], str(row["label"]).lower() == "true")


def parse(pixels: np.ndarray) -> list[list[Item]] | None:
    """The objects of each of the three boxes; None where some touch in the same colour and cannot be told apart.

    Args:
        pixels: uint8[100, 400, 3], a scene as published.
    """
    from scipy import ndimage

    label: Any = ndimage.label  # its annotation knows no tuple

    boxes = []
    for start in range(0, 3 * STRIDE, STRIDE):
        box, items = pixels[:, start : start + SIDE], []
        for color, rgb in COLORS.items():
            marked, _ = label((box == rgb).all(-1))
            places: Any = ndimage.find_objects(marked)
            for index, place in enumerate(places):
                item = _item(color, marked[place] == index + 1, place)
                if item is None:
                    return None
                items.append(item)
        boxes.append(items)
    return boxes


def _item(color: str, drawn: np.ndarray, place: tuple[slice, slice]) -> Item | None:
    height, width = drawn.shape
    size = next((name for name, side in SIZES.items() if abs(max(height, width) - side) <= 2), None)
    if size is None or height != width:
        return None
    shape = min(SHARES[size], key=lambda name: abs(SHARES[size][name] - drawn.mean()))
    if abs(SHARES[size][shape] - drawn.mean()) > 0.06:
        return None
    rows, columns = place
    gaps = {"t": rows.start, "b": SIDE - rows.stop, "l": columns.start, "r": SIDE - columns.stop}
    walls = "".join(name for name, gap in gaps.items() if gap <= 1)
    return Item(color, shape, size, rows.start, columns.start, walls)


def arrange(pixels: np.ndarray) -> np.ndarray:
    """The three boxes of a scene uint8[100, 400, 3] on a square canvas uint8[208, 208, 3], row by row."""
    canvas = np.full((CANVAS, CANVAS, 3), WALL, np.uint8)
    for number in range(3):
        row, column = (CANVAS - SIDE) * (number // 2), (CANVAS - SIDE) * (number % 2)
        canvas[row : row + SIDE, column : column + SIDE] = pixels[:, number * STRIDE : number * STRIDE + SIDE]
    return canvas


def recolour(pixels: np.ndarray, text: str, change: Mapping[str, str]) -> tuple[np.ndarray, str]:
    """The scene and its sentence with colours exchanged in both; edges stay as soft as they were."""
    packed = pixels.reshape(-1, 3).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    colours, places = np.unique(packed, return_inverse=True)
    palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.float64)
    offset, tints = palette - GROUND, {name: np.asarray(rgb) - float(GROUND) for name, rgb in COLORS.items()}
    shares = {name: offset @ tint / (tint @ tint) for name, tint in tints.items()}
    rest = np.stack([np.abs(offset - shares[name][:, None] * tint).sum(-1) for name, tint in tints.items()])
    mixed = (rest.min(axis=0) < 12) & ~np.all(palette == WALL, axis=1)
    for index, name in enumerate(tints):
        mine = mixed & (rest.argmin(axis=0) == index) & (shares[name] > 0.05)
        if change[name] != name:
            palette[mine] = GROUND + shares[name][mine][:, None] * tints[change[name]]
    words = re.sub("|".join(COLORS), lambda match: change[match.group()], text.lower())
    return np.clip(np.round(palette), 0, 255).astype(np.uint8)[places].reshape(pixels.shape), words


def colourings() -> Iterator[dict[str, str]]:
    """The six ways to exchange three colours; the first changes nothing."""
    for names in itertools.permutations(COLORS):
        yield dict(zip(COLORS, names, strict=True))


def vocabulary(sentences: list[str]) -> list[str]:
    """BERT's special tokens, single characters, the words of the sentences, and free places up to `VOCABULARY`.

    Raises:
        UserError: more different words than there are places.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted({word for text in sentences for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())})
    pieces = list(dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]))
    if len(pieces) > VOCABULARY:
        raise UserError(f"the sentences need a vocabulary of {len(pieces)} words and letters, more than {VOCABULARY}")
    return pieces + [f"[unused{index}]" for index in range(VOCABULARY - len(pieces))]


def plain(text: str) -> str:
    """A sentence in lower case without its full stop and needless blanks."""
    return " ".join(text.lower().rstrip(". ").split())


def balanced(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples of sentences that are true of some scenes and false of others, the rarer kind repeated."""
    sentences: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for row in rows:
        sentences.setdefault(plain(row["text"]), ([], []))[row["label"]].append(row)
    chosen = []
    for kinds in sentences.values():
        count = max(map(len, kinds)) if all(kinds) else 0
        chosen += [row for kind in kinds for row in itertools.islice(itertools.cycle(kind), count)]
    return chosen


def _write_train(folder: Path, archive: Path, rng: np.random.Generator) -> list[str]:
    human, generated, captions = [], [], []
    for number, (pixels, sentence, label) in enumerate(examples(archive)):
        boxes = parse(pixels)
        for index, change in enumerate(colourings()):
            drawn, text = recolour(pixels, sentence, change)
            image = f"images/train_{number:04d}_{index}.png"
            (folder / image).write_bytes(png(arrange(drawn)))
            human.append({"image": image, "text": text, "label": label})
            if boxes is None:
                continue
            seen = [[item._replace(color=change[item.color]) for item in box] for box in boxes]
            captions.append({"image": image, "text": description(seen)})
            for _ in range(STATEMENTS_PER_COLOURING):
                text, truth = statement(seen, rng)
                generated.append({"image": image, "text": text, "label": truth})
    statements = balanced(generated)
    for name, pattern in PARTS.items():
        _write_json(folder / f"{name}.json", [row for row in statements if re.fullmatch(pattern, row["text"])])
    for name, rows in (("human", balanced(human)), ("captions", captions)):
        _write_json(folder / f"{name}.json", rows)
    return [row["text"] for row in (*human, *generated, *captions)]


def _write_test(folder: Path, archive: Path) -> None:
    rows = []
    for number, example in enumerate(itertools.islice(examples(archive), TEST_FROM, None)):
        image = f"images/test_{number:04d}.png"
        (folder / image).write_bytes(png(arrange(example.pixels)))
        rows.append({"image": image, "text": example.text, "label": example.label})
    _write_json(folder / "test.json", rows)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
