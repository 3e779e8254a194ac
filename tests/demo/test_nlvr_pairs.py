"""NLVR's scenes as pairs: nothing that is held out is trained on, in whatever colours and order of boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm.demo import nlvr, nlvr_pairs, visual_words

SENTENCES = ("There is a {} box.", "there are two  {} items", "A {} tower", "a {} circle", "no {} square", "the {} one")


def scene(seed: int, color: str = "blue", order=(0, 1, 2)) -> np.ndarray:
    pixels = np.full((nlvr.SIDE, 400, 3), nlvr.WALL, np.uint8)
    for place, number in enumerate(order):
        top, left = np.random.default_rng((seed, number)).integers(0, 80, 2)
        box = pixels[:, place * nlvr.STRIDE :][:, : nlvr.SIDE]
        box[:] = nlvr.GROUND
        box[top : top + 20, left : left + 20] = nlvr.COLORS[color]
    return pixels


def examples(count: int, first: int, repeated: int = 1) -> list[nlvr.Example]:
    """Scenes with sentences in turn, every other one true; `repeated` with the boxes in other orders."""
    rows, colors = [], list(nlvr.COLORS)
    for number in range(first, first + count):
        for turn in range(repeated):
            color = colors[(number + turn) % 3]
            text = SENTENCES[number % len(SENTENCES)].format(color)
            order = np.roll(range(3), turn)
            rows.append(nlvr.Example(scene(number, color, order), text, number // len(SENTENCES) % 2 == 0))
    return rows


def test_sentences_and_boxes_are_held_out_in_all_colours():
    train, test = examples(24, 0, repeated=3), examples(12, 100)
    test += [nlvr.Example(scene(1, "black", (2, 0, 1)), row.text, True) for row in test[:6]]  # a scene of training
    kept, unseen = nlvr_pairs.divide(train, test, np.random.default_rng(0))
    forms = [{nlvr_pairs.form(row.text) for row in rows} for rows in (kept, unseen)]
    assert len(forms[0]) == 4 and len(forms[1]) == 2 and not forms[0] & forms[1]
    assert len(unseen) == 6
    shapes = [{nlvr_pairs.boxes(row.pixels) for row in rows} for rows in (kept, unseen)]
    assert len(shapes[0] | shapes[1]) == len(shapes[0]) + len(shapes[1])
    assert nlvr_pairs.boxes(scene(1)) in shapes[1] and 24 * 3 * 4 // 6 - 3 <= len(kept) <= 24 * 3 * 4 // 6


def test_forms_and_boxes():
    assert nlvr_pairs.form("There is a Yellow  box. ") == nlvr_pairs.form("there is a blue box") == "there is a * box"
    assert nlvr_pairs.boxes(scene(3)) == nlvr_pairs.boxes(scene(3, "yellow", (1, 2, 0)))
    assert nlvr_pairs.boxes(scene(3)) != nlvr_pairs.boxes(scene(4)) and len(nlvr_pairs.boxes(scene(3))) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nlvr, "archives", lambda source: ("train", "test"))
        patch.setattr(nlvr, "examples", lambda name: examples(12, 0) if name == "train" else examples(48, 100))
        return nlvr_pairs.prepare_pairs("unused", tmp_path_factory.mktemp("nlvr") / "pairs")


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_training_scenes_in_several_colourings(folder):
    scenes, pairs, texts = (read(folder, f"{name}_train.json") for name in ("scenes", "pairs", "texts"))
    assert len(scenes) == len(texts) == 8 * nlvr_pairs.COLOURINGS and len(pairs) == 4 * nlvr_pairs.COLOURINGS
    assert nlvr_pairs.texts(folder) == [row["text"] for row in texts]
    for row in pairs:
        pixels = np.asarray(Image.open(folder / row["image"])).reshape(-1, 3)
        assert len(pixels) == visual_words.SIDE**2
        named = next(color for color in nlvr.COLORS if color in row["caption"])
        assert (pixels == nlvr.COLORS[named]).all(-1).any()
    assert len({(folder / row["image"]).read_bytes() for row in scenes}) > 8


def test_held_out_pairs_and_wrong_sentences(folder):
    pairs, rows = read(folder, "pairs_test.json"), read(folder, "matches_test.json")
    assert len(pairs) == 8 and len(read(folder, "scenes_test.json")) == len(read(folder, "texts_test.json")) == 16
    right = {row["image"]: row["caption"][0] for row in pairs}
    assert len(rows) == 16 and all((right[row["image"]] == row["text"]) == row["label"] for row in rows)
    assert sum(row["label"] for row in rows) == 8


def test_archives_are_named(tmp_path):
    with pytest.raises(nlvr.UserError, match=r"nlvr_dev600_perm1to5\.tar"):
        nlvr_pairs.prepare_pairs(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
