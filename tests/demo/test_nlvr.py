"""NLVR scenes read off their pixels, recoloured, and stated about: everything against scenes drawn here."""

from __future__ import annotations

import functools
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm.demo import nlvr, statements
from vlm.demo.nlvr import Item

SCATTERED = [
    [("yellow", "circle", 30, 0, 40), ("black", "square", 10, 50, 50)],
    [("blue", "triangle", 20, 80, 0)],
    [],
]
TOWERS = [["black", "yellow"], ["blue"], ["black", "blue", "blue"]]


def scattered() -> np.ndarray:
    image = blank()
    draw = ImageDraw.Draw(image)
    for number, box in enumerate(SCATTERED):
        for color, shape, size, top, left in box:
            x, y = left + number * nlvr.STRIDE, top
            corners = (x, y, x + size - 1, y + size - 1)
            if shape == "triangle":
                draw.polygon([(x, y + size - 1), (x + size - 1, y + size - 1), (x + size // 2, y)], nlvr.COLORS[color])
            else:
                getattr(draw, {"circle": "ellipse", "square": "rectangle"}[shape])(corners, nlvr.COLORS[color])
    return np.asarray(image)


def towers() -> np.ndarray:
    image = blank()
    draw = ImageDraw.Draw(image)
    for number, tower in enumerate(TOWERS):
        for level, color in enumerate(tower):
            left, top = 40 + number * nlvr.STRIDE, 80 - 21 * level
            draw.rectangle((left, top, left + 19, top + 19), nlvr.COLORS[color])
    return np.asarray(image)


def blank() -> Image.Image:
    pixels = np.full((nlvr.SIDE, 400, 3), nlvr.WALL, np.uint8)
    for number in range(3):
        pixels[:, number * nlvr.STRIDE : number * nlvr.STRIDE + nlvr.SIDE] = nlvr.GROUND
    return Image.fromarray(pixels)


def test_parse_finds_every_object():
    boxes = nlvr.parse(scattered())
    assert boxes is not None
    assert sorted(boxes[0]) == [
        Item("black", "square", "small", 50, 50, ""),
        Item("yellow", "circle", "big", 0, 40, "t"),
    ]
    assert [item[:3] + item[-1:] for item in boxes[1]] == [("blue", "triangle", "medium", "bl")] and boxes[2] == []
    assert not statements.is_towers(boxes)


def test_parse_gives_up_where_objects_melt():
    image = Image.fromarray(scattered())
    ImageDraw.Draw(image).rectangle((60, 50, 69, 59), nlvr.COLORS["black"])
    assert nlvr.parse(np.asarray(image)) is None


def test_recolour_exchanges_pixels_and_words():
    change = {"yellow": "black", "black": "blue", "blue": "yellow"}
    drawn, text = nlvr.recolour(scattered(), "A Black block over a yellow one", change)
    assert text == "a blue block over a black one"
    before, after = nlvr.parse(scattered()), nlvr.parse(drawn)
    assert before is not None and after is not None
    swapped = [sorted(item._replace(color=change[item.color]) for item in box) for box in before]
    assert swapped == [sorted(box) for box in after]
    unchanged = next(nlvr.colourings())
    np.testing.assert_array_equal(nlvr.recolour(scattered(), "", unchanged)[0], scattered())
    edge = np.array([[[233, 233, 105]]], np.uint8)  # half yellow, half ground
    assert nlvr.recolour(edge, "", change)[0].tolist() == [[[105, 105, 105]]]


@pytest.mark.parametrize("text,truth", [
    ("there is a tower with exactly two blocks", True),
    ("there is a tower with four blocks", False),
    ("there is a tower with a yellow block at the top", True),
    ("there is a tower with a yellow block at the base", False),
    ("there are exactly two towers with a blue block at the top", True),
    ("there is a tower with a blue block over a black block", True),
    ("there is a tower with a black block above a blue block", False),
    ("there is a tower with at least two blue blocks", True),
    ("there is a tower with only black blocks", False),
    ("there is a tower with only blue blocks", True),
    ("the tower with three blocks has a black block at the base", True),
    ("there are two towers with the same height", False),
    ("there is a tower with one blue block", True),
    ("there is one tower with two blue blocks", True),
    ("there are two black blocks as the base of a tower", True),
    ("there is one black block as the base of a tower", False),
    ("there is a blue block as the top of a tower with three blocks", True),
    ("there is no yellow block on a blue block", True),
    ("there are three blue blocks", True),
    ("there are two blue blocks", False),
    ("there is a blue tower", True),
    ("there is a tower with only yellow and black blocks", True),
])  # fmt: skip
def test_tower_sentences_are_true_of_the_scene(text, truth):
    assert drawn_sentences(towers)[text] == truth


@pytest.mark.parametrize("text,truth", [
    ("there is exactly one yellow circle", True),
    ("there is a triangle touching the edge", True),
    ("there is a triangle touching a corner", True),
    ("there is a blue triangle touching the bottom of a box", True),
    ("there is a blue triangle touching right wall of a box", False),
    ("there are two objects touching the wall", True),
    ("there is at most one item not touching any edge", True),
    ("there is a small black square", True),
    ("there is a big black square", False),
    ("there is a box with exactly two items", True),
    ("there is a box with only blue items", True),
    ("there is a box with items of all three colors", False),
    ("there is a box with a yellow circle and a black square", True),
    ("one of the grey box has two items", True),
    ("there is a box with two items and a yellow one on top", True),
    ("there is a box with two items and a black one on top", False),
    ("there is no yellow triangle", True),
    ("each grey box contains at least one item", False),
])  # fmt: skip
def test_scattered_sentences_are_true_of_the_scene(text, truth):
    assert drawn_sentences(scattered)[text] == truth


def test_descriptions():
    found = [statements.description(boxes) for boxes in (nlvr.parse(towers()), nlvr.parse(scattered())) if boxes]
    assert found[0] == "first black yellow second blue third black blue blue"
    assert found[1] == "first 1 black square 1 yellow circle one wall second 1 blue triangle one wall third"


def test_people_s_sentences_become_as_often_true_as_false():
    labels = {"A box.": [True, False, True], "a  box": [True], "a tower": [True, True], "no": [False]}
    rows = [{"text": text, "label": label} for text, several in labels.items() for label in several]
    chosen = nlvr.balanced(rows)
    assert [row["label"] for row in chosen] == [False] * 3 + [True] * 3
    assert {row["text"] for row in chosen} == {"A box.", "a  box"}
    assert sum(row["text"] == "a  box" for row in chosen) == 1


@functools.cache
def drawn_sentences(scene) -> dict[str, bool]:
    boxes, rng = nlvr.parse(scene()), np.random.default_rng(0)
    assert boxes is not None
    pairs = [statements.statement(boxes, rng) for _ in range(40_000)]
    truths = dict(pairs)
    assert all(truths[text] == truth for text, truth in pairs)  # a sentence is never both
    assert 0.4 < np.mean([truth for _, truth in pairs]) < 0.6
    return truths


def test_prepared_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(nlvr, "TEST_FROM", 10)
    monkeypatch.setattr(nlvr, "STATEMENTS_PER_COLOURING", 100)
    source = tmp_path / "source"
    source.mkdir()
    for name, count in ((nlvr.TRAIN, 2), (nlvr.TEST, 12)):
        with tarfile.open(source / name, "w") as archive:
            for number in range(count):
                text = f"There is a Yellow item{f' {number}' if name == nlvr.TEST else ''}"
                row = {"sentence": text, "label": "true" if number % 2 else "false"}
                content = {"json": json.dumps(row).encode(), "png": nlvr.png(scattered())}
                for suffix, data in content.items():
                    info = tarfile.TarInfo(f"dev-{number:04d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    folder = nlvr.prepare_nlvr(source, tmp_path / "nlvr")
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    human, test = read("human.json"), read("test.json")
    assert len(human) == 12 and {row["text"] for row in human} == {f"there is a {color} item" for color in nlvr.COLORS}
    generated, towers = read("statements.json"), read("towers.json")
    truths: dict[str, set[bool]] = {}
    for row in generated:
        truths.setdefault(row["text"], set()).add(row["label"])
    assert generated and all(len(both) == 2 for both in truths.values()) and towers == [] == read("simple.json")
    boxes = nlvr.parse(scattered())
    assert boxes is not None
    assert [row["text"] for row in read("captions.json")[:7:6]] == [statements.description(boxes)] * 2
    assert [row["text"] for row in test] == ["There is a Yellow item 10", "There is a Yellow item 11"]
    assert [row["label"] for row in test] == [False, True]
    assert "10" not in (folder / "tokenizer" / "vocab.txt").read_text().split()
    canvas = np.asarray(Image.open(folder / test[0]["image"]))
    np.testing.assert_array_equal(canvas[:100, 108:], scattered()[:, 150:250])


def test_missing_archive_is_named(tmp_path):
    with pytest.raises(nlvr.UserError, match=r"nlvr_dev600_perm1to5\.tar"):
        nlvr.prepare_nlvr(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
