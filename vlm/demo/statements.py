"""Sentences about NLVR scenes that a program can check: what `vlm.demo.nlvr` bootstraps its captions from.

A form draws its words and returns the sentence with its truth. Forms say what people say about such scenes, in their
words: numbers, colours, shapes, towers from base to top, walls and corners. "Two" means exactly two, "a" at least one.
A scene is a list of three boxes, each a list of `nlvr.Item`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Box = list[Any]
Tower = list[str]
Form = Callable[[list[Box], np.random.Generator], tuple[str, bool]]
COLORS = ("yellow", "black", "blue")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
COUNTS: dict[str, Callable[[int, int], bool]] = {
    "": lambda found, said: found == said,
    "exactly": lambda found, said: found == said,
    "only": lambda found, said: found == said,
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


def description(boxes: list[Box]) -> str:
    """What is in each box, in one order of words: towers from base to top, otherwise how many of each kind.

    Numbers are followed by how many of the kind touch a wall, if any do.
    """
    parts = []
    for place, box in zip(("first", "second", "third"), boxes, strict=True):
        if is_towers(boxes):
            words = [item.color for item in sorted(box, key=lambda item: -item.top)]
        else:
            kinds = sorted({(item.color, item.shape) for item in box})
            groups = [[item for item in box if (item.color, item.shape) == kind] for kind in kinds]
            words = [_group(*kind, group) for kind, group in zip(kinds, groups, strict=True)]
        parts.append(" ".join([place, *words]))
    return " ".join(parts)


def _group(color: str, shape: str, items: Box) -> str:
    touching = sum(bool(item.walls) for item in items)
    return f"{len(items)} {color} {shape}" + (f" {NUMBERS[touching]} wall" if touching else "")


# -------------------------------------------------------------------------------------------------------------- words


class Said(NamedTuple):
    """Words, the ending of the noun after them ("" or "s"), and what number makes them true."""

    words: str
    plural: str
    true_of: Callable[[int], bool]


def _one_of(rng: np.random.Generator, *choices: str) -> str:
    return choices[rng.integers(len(choices))]


def _amount(rng: np.random.Generator, most: int) -> Said:
    """A number of things: "exactly two", "at least 3", "one" …, up to `most`."""
    count, how = int(rng.integers(1, most + 1)), _one_of(rng, "", "", "exactly", "only", "at least", "at most")
    number = str(count) if rng.random() < 0.35 else NUMBERS[count]
    return Said(f"{how} {number}".strip(), "s" * (count > 1), lambda found: COUNTS[how](found, count))


def _there(rng: np.random.Generator, most: int = 3) -> Said:
    """The opening: "there is a", "there are two" …"""
    draw = rng.random()
    if draw < 0.4:
        return Said("there is a", "", lambda found: found > 0)
    if draw < 0.45:
        return Said("there is no", "", lambda found: found == 0)
    words, plural, true_of = _amount(rng, most)
    return Said(f"there {'are' if plural else 'is'} {words}", plural, true_of)


# ------------------------------------------------------------------------------------------------------------- towers


def _towers(boxes: list[Box]) -> list[Tower]:
    """Colours of each tower from base to top."""
    return [[item.color for item in sorted(box, key=lambda item: -item.top)] for box in boxes if box]


def _end(rng: np.random.Generator) -> tuple[str, str, Callable[[Tower], bool]]:
    """A colour, an end of a tower, and whether a tower has the colour there."""
    color, end = _one_of(rng, *COLORS), _one_of(rng, "base", "top", "top", "bottom")
    return color, end, lambda tower: tower[-1 if end == "top" else 0] == color


def _over(rng: np.random.Generator) -> tuple[str, Callable[[Tower], int]]:
    """Like "yellow block over a blue block", and how often a tower has it."""
    upper, lower = _one_of(rng, *COLORS), _one_of(rng, *COLORS)
    text = f"{upper} block {_one_of(rng, 'over', 'above', 'on', 'on top of')} a {lower} block"
    return text, lambda tower: sum(pair == (lower, upper) for pair in zip(tower, tower[1:], strict=False))


def _blocks(rng: np.random.Generator) -> tuple[str, Callable[[Tower], bool]]:
    words, plural, true_of = _amount(rng, 4)
    return f"{words} block{plural}", lambda tower: true_of(len(tower))


def _trait(rng: np.random.Generator) -> tuple[str, Callable[[Tower], bool]]:
    """What a tower may have."""
    draw, color, other = rng.random(), _one_of(rng, *COLORS), _one_of(rng, *COLORS)
    if draw < 0.35:
        color, end, has = _end(rng)
        return f"a {color} block at the {end}", has
    if draw < 0.5:
        text, times = _over(rng)
        return f"a {text}", lambda tower: times(tower) > 0
    if draw < 0.65:
        words, plural, true_of = _amount(rng, 3)
        return f"{words} {color} block{plural}", lambda tower: true_of(tower.count(color))
    if draw < 0.8:
        return _blocks(rng)
    if draw < 0.85:
        return "blocks of all three colors", lambda tower: len(set(tower)) == 3
    if draw < 0.92:
        return f"only {color} blocks", lambda tower: set(tower) == {color}
    if color == other:
        return f"only one block which is {color}", lambda tower: tower == [color]
    if draw < 0.96:
        return f"only {color} and {other} blocks", lambda tower: set(tower) == {color, other}
    return f"a {color} block and a {other} block", lambda tower: {color, other} <= set(tower)


def _tower_with(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (there, plural, true_of), (trait, has) = _there(rng), _trait(rng)
    link = _one_of(rng, "with", "with", "with", "that have" if plural else "that has")
    return f"{there} tower{plural} {link} {trait}", true_of(sum(map(has, _towers(boxes))))


def _end_block(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (there, plural, true_of), (color, end, has) = _there(rng), _end(rng)
    text, high = "", lambda tower: True
    if rng.random() < 0.4:
        words, high = _blocks(rng)
        text = f" with {words}"
    found = sum(has(tower) and high(tower) for tower in _towers(boxes))
    return f"{there} {color} block{plural} as the {end} of a tower{text}", true_of(found)


def _above(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (there, plural, true_of), (text, times) = _there(rng), _over(rng)
    found = sum(map(times, _towers(boxes)))
    return f"{there} {text.replace('block', f'block{plural}', 1)}", true_of(found)


def _total(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (words, plural, true_of), color = _amount(rng, 6), _one_of(rng, *COLORS)
    be = "are" if plural else "is"
    return f"there {be} {words} {color} block{plural}", true_of(sum(t.count(color) for t in _towers(boxes)))


def _tall(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    count, (color, end, has) = int(rng.integers(1, 5)), _end(rng)
    text = f"the tower with {NUMBERS[count]} block{'s' * (count > 1)} has a {color} block at the {end}"
    return text, any(len(tower) == count and has(tower) for tower in _towers(boxes))


def _alike(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    heights, word = [len(tower) for tower in _towers(boxes)], _one_of(rng, "two", "at least two")
    if rng.random() < 0.5:
        return f"there are {word} towers with the same height", len(set(heights)) < len(heights)
    color = _one_of(rng, *COLORS)
    return f"there is a {color} tower", any(set(tower) == {color} for tower in _towers(boxes))


# ---------------------------------------------------------------------------------------------------------- all scenes


def _kind(rng: np.random.Generator, *nouns: str) -> tuple[str, Callable[[Any], bool]]:
    """Words for a kind of object, singular, and its test."""
    color = _one_of(rng, *COLORS) if rng.random() < 0.75 else ""
    shape = _one_of(rng, "square", "circle", "triangle") if not nouns and rng.random() < 0.7 else ""
    noun = shape or _one_of(rng, *(nouns or ("item", "object")))
    return f"{color} {noun}".strip(), lambda item: color in ("", item.color) and shape in ("", item.shape)


def _place(rng: np.random.Generator) -> tuple[str, Callable[[Any], bool]]:
    draw, edge = rng.random(), _one_of(rng, "edge", "wall")
    if draw < 0.4:
        return "", lambda item: True
    if draw < 0.6:
        return f" touching the {edge}", lambda item: bool(item.walls)
    if draw < 0.8:
        return f" not touching any {edge}", lambda item: not item.walls
    near = _one_of(rng, "", "closely ")
    if draw < 0.87:
        return f" {near}touching a corner", lambda item: len(item.walls) > 1
    side = _one_of(rng, "bottom", "right", "base")
    text = f" {near}touching " + {"base": "the base"}.get(side, f"{'the ' * (side != 'right')}{side} wall of a box")
    return text.replace("bottom wall", "bottom"), lambda item: ("r" if side == "right" else "b") in item.walls


def _number(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (there, plural, true_of), (kind, is_kind), (where, is_there) = _there(rng, 5), _kind(rng), _place(rng)
    size = _one_of(rng, "small", "medium", "big") if rng.random() < 0.1 else ""
    fits = lambda item: is_kind(item) and is_there(item) and size in ("", item.size)  # noqa: E731
    text = f"{there} {size} {kind}{plural}{where}".replace("  ", " ")
    return text, true_of(sum(fits(item) for box in boxes for item in box))


def _content(rng: np.random.Generator, *nouns: str) -> tuple[str, Callable[[Box], bool]]:
    """What a box may have in it."""
    draw, color, other = rng.random(), _one_of(rng, *COLORS), _one_of(rng, *COLORS)
    colors = lambda box: {item.color for item in box}  # noqa: E731
    if draw < 0.45:
        (words, plural, true_of), (kind, fits) = _amount(rng, 6), _kind(rng, *nouns)
        return f"{words} {kind}{plural}", lambda box: true_of(sum(map(fits, box)))
    if draw < 0.6:
        (kind, fits), (second, fits_second), no = _kind(rng, *nouns), _kind(rng, *nouns), bool(rng.random() < 0.4)
        text = f"a {kind} and {f'no {second}s' if no else f'a {second}'}"
        return text, lambda box: any(map(fits, box)) and any(map(fits_second, box)) != no
    if draw < 0.7:
        (words, plural, true_of), top = _amount(rng, 5), lambda box: min(box, key=lambda item: item.top).color
        text = f"{words} item{plural} and a {color} {_one_of(rng, 'item', 'one')} on top"
        return text, lambda box: len(box) > 0 and true_of(len(box)) and top(box) == color
    if draw < 0.78:
        return f"only {color} items", lambda box: colors(box) == {color}
    if draw < 0.86 or color == other:
        return "items of only one color", lambda box: len(colors(box)) == 1
    if draw < 0.93:
        text = _one_of(rng, f"only {color} and {other} items", f"items of only {color} and {other} color")
        return text, lambda box: colors(box) == {color, other}
    return f"items of all {_one_of(rng, 'three', '3')} colors", lambda box: len(colors(box)) == 3


def _box_with(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    content, has = _content(rng, *(("item",) if is_towers(boxes) else ()))
    found = sum(map(has, boxes))
    if rng.random() < 0.25:
        verb = _one_of(rng, "has", "contains")
        return f"one of the grey {_one_of(rng, 'box', 'square')} {verb} {content}", found > 0
    there, plural, true_of = _there(rng)
    return f"{there} box{'es' * bool(plural)} with {content}", true_of(found)


def _each_box(boxes: list[Box], rng: np.random.Generator) -> tuple[str, bool]:
    (kind, fits), (where, is_there) = _kind(rng), _place(rng)
    text = f"each {_one_of(rng, 'grey ', '')}box {_one_of(rng, 'contains', 'has')} at least one {kind}{where}"
    return text, all(any(fits(item) and is_there(item) for item in box) for box in boxes)


TOWERS: tuple[Form, ...] = (
    *(_tower_with,) * 8,
    *(_end_block,) * 4,
    *(_above,) * 2,
    *(_box_with,) * 2,
    *(_total, _tall, _alike),
)
SCATTERED: tuple[Form, ...] = (*(_number,) * 5, *(_box_with,) * 4, _each_box)
