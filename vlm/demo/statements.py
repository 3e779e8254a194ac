"""Sentences about NLVR scenes that a program can check: what `vlm.demo.nlvr` bootstraps its captions from.

A form draws its words and returns the sentence with its truth. Forms say what people say about such scenes: numbers,
colours, shapes, towers from base to top, walls. A scene is a list of three boxes, each a list of `nlvr.Item`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Box = list[Any]
Form = Callable[[list[Box], np.random.Generator], tuple[str, bool]]
COLORS = ("yellow", "black", "blue")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
COUNTS: dict[str, Callable[[int, int], bool]] = {
    "exactly": lambda found, said: found == said,
    "at least": lambda found, said: found >= said,
    "at most": lambda found, said: found <= said,
}
_TRIES = 40


def statement(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    """A sentence about the scene and whether it is true, as often the one as the other."""
    forms, wanted = TOWERS if is_towers(boxes) else SCATTERED, bool(rng.random() < 0.5)
    for _ in range(_TRIES):
        text, truth = forms[rng.integers(len(forms))](boxes, rng)
        if truth == wanted:
            break
    return text, bool(truth)


def is_towers(boxes: list[Box]) -> bool:
    """Whether every object is a block in the middle of its box."""
    items = [item for box in boxes for item in box]
    return all(item.shape == "square" and item.size == "medium" and abs(item.left - 40) <= 1 for item in items)


# ------------------------------------------------------------------------------------------------------------- towers


def _towers(boxes: list[Box]) -> list[list[str]]:
    """Colours of each tower from base to top."""
    return [[item.color for item in sorted(box, key=lambda item: -item.top)] for box in boxes if box]


def _height(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    count, word = int(rng.integers(1, 5)), str(rng.choice(["", "exactly ", "only "]))
    text = f"there is a tower with {word}{NUMBERS[count]} block{'s' * (count > 1)}"
    return text, any(len(tower) == count for tower in _towers(boxes))


def _end(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    color, end = str(rng.choice(COLORS)), str(rng.choice(["base", "top", "bottom"]))
    found = sum(tower[-1 if end == "top" else 0] == color for tower in _towers(boxes))
    tail = f"a {color} block at the {end}"
    if rng.random() < 0.5:
        return f"there is a tower with {tail}", found > 0
    count, how = int(rng.integers(1, 4)), str(rng.choice(["exactly", "at least"]))
    be, plural = ("is", "") if count == 1 else ("are", "s")
    return f"there {be} {how} {NUMBERS[count]} tower{plural} with {tail}", COUNTS[how](found, count)


def _above(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    upper, lower = (str(c) for c in rng.choice(COLORS, 2))
    word = str(rng.choice(["over", "above", "on top of"]))
    found = sum(any(pair == (lower, upper) for pair in zip(t, t[1:], strict=False)) for t in _towers(boxes))
    return f"there is a tower with a {upper} block {word} a {lower} block", found > 0


def _colored(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    color, count, how = str(rng.choice(COLORS)), int(rng.integers(1, 4)), str(rng.choice(list(COUNTS)))
    text = f"there is a tower with {how} {NUMBERS[count]} {color} block{'s' * (count > 1)}"
    return text, any(COUNTS[how](tower.count(color), count) for tower in _towers(boxes))


def _tower_colors(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    kinds = [set(tower) for tower in _towers(boxes)]
    if rng.random() < 0.5:
        color = str(rng.choice(COLORS))
        return f"there is a tower with only {color} blocks", {color} in kinds
    return "there is a tower with blocks of all three colors", any(len(kind) == 3 for kind in kinds)


def _tall(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    towers, count, color = _towers(boxes), int(rng.integers(1, 5)), str(rng.choice(COLORS))
    end = str(rng.choice(["base", "top"]))
    text = f"the tower with {NUMBERS[count]} block{'s' * (count > 1)} has a {color} block at the {end}"
    return text, any(len(tower) == count and tower[-1 if end == "top" else 0] == color for tower in towers)


def _same_height(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    heights, word = [len(tower) for tower in _towers(boxes)], str(rng.choice(["two", "at least two"]))
    return f"there are {word} towers with the same height", len(set(heights)) < len(heights)


# ---------------------------------------------------------------------------------------------------------- scattered


def _kind(rng: np.random.Generator) -> tuple[str, str, Callable[[Any], bool]]:
    """Words for a kind of object, singular and plural, and its test."""
    color = str(rng.choice(COLORS)) if rng.random() < 0.7 else ""
    shape = str(rng.choice(["square", "circle", "triangle"])) if rng.random() < 0.75 else ""
    noun = shape or str(rng.choice(["item", "object"]))
    words = f"{color} {noun}".strip()
    return words, f"{words}s", lambda item: color in ("", item.color) and shape in ("", item.shape)


def _place(rng: np.random.Generator) -> tuple[str, Callable[[Any], bool]]:
    draw, edge = rng.random(), str(rng.choice(["edge", "wall"]))
    if draw < 0.5:
        return "", lambda item: True
    if draw < 0.75:
        return f" touching the {edge}", lambda item: item.walls
    return f" not touching any {edge}", lambda item: not item.walls


def _number(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (one, many, test), (where, there) = _kind(rng), _place(rng)
    count, how = int(rng.integers(1, 6)), str(rng.choice(list(COUNTS)))
    found = sum(test(item) and there(item) for box in boxes for item in box)
    be, noun = ("is", one) if count == 1 else ("are", many)
    return f"there {be} {how} {NUMBERS[count]} {noun}{where}", COUNTS[how](found, count)


def _exists(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (one, _, test), (where, there) = _kind(rng), _place(rng)
    size = str(rng.choice(["small", "medium", "big", "", ""]))
    fits = lambda item: test(item) and there(item) and size in ("", item.size)  # noqa: E731
    return f"there is a {size} {one}{where}".replace("  ", " "), any(fits(item) for box in boxes for item in box)


def _box_with(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (one, many, test), count = _kind(rng), int(rng.integers(1, 6))
    how = str(rng.choice(list(COUNTS)))
    found = [sum(test(item) for item in box) for box in boxes]
    text = f"there is a box with {how} {NUMBERS[count]} {one if count == 1 else many}"
    return text, any(COUNTS[how](number, count) for number in found)


def _box_colors(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    kinds = [{item.color for item in box} for box in boxes if box]
    draw, color = rng.random(), str(rng.choice(COLORS))
    if draw < 0.4:
        return f"there is a box with only {color} items", {color} in kinds
    if draw < 0.7:
        return "there is a box with items of all three colors", any(len(kind) == 3 for kind in kinds)
    return "there is a box with items of only one color", any(len(kind) == 1 for kind in kinds)


def _each_box(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    one, _, test = _kind(rng)
    where, there = _place(rng)
    text = f"each grey box contains at least one {one}{where}"
    return text, all(any(test(item) and there(item) for item in box) for box in boxes)


TOWERS: tuple[Form, ...] = (_height, _end, _end, _end, _above, _colored, _tower_colors, _tall, _same_height)
SCATTERED: tuple[Form, ...] = (_number, _number, _exists, _box_with, _box_with, _box_colors, _each_box)
