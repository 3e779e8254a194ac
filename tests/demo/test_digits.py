"""FLAVA's data: single digits, sentences, right and wrong captions, visual words that are their patches' nearest."""

import json

import numpy as np
import pytest

from vlm.data.teacher_cache import TeacherCache
from vlm.demo import digits, scenes, visual_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", {"train": 60, "test": 40})
        patch.setattr(digits, "DIGITS", {"train": 30, "test": 20})
        output = tmp_path_factory.mktemp("flava")
        return digits.prepare_digits(scenes.prepare_scenes(output / "scenes"), output / "flava")


@pytest.fixture(scope="module")
def words(folder):
    folders = [folder, folder.parent / "scenes"]
    return visual_words.prepare_words(folder.parent / "words", folders, digits.vocabulary())


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_every_picture_has_the_nearest_words(folder, words):
    cache, means = TeacherCache(words / "visual_words", verify=True), np.load(words / visual_words.MEANS)
    assert cache.dim == 36 and cache.teacher.startswith("codebook:") and len(means) == visual_words.COUNT
    paths = [*folder.glob("images/*.png"), *folder.parent.glob("scenes/images/*.png")]
    assert len(paths) == 150
    distances = []
    for path in paths[::10]:
        image = path.read_bytes()
        rows = visual_words.patches(image).astype(np.float32)
        distance = ((rows[:, None] - means) ** 2).sum(-1)
        np.testing.assert_allclose(distance[np.arange(36), cache[image]], distance.min(1), rtol=1e-3, atol=1.0)
        distances.append(distance.min(1).mean())
    white = np.full(3 * visual_words.PATCH**2, 255.0)
    np.testing.assert_allclose(means[0], white, atol=1.0)  # the most frequent
    assert np.mean(distances) < 0.05 * ((means[1:] - white) ** 2).sum(-1).mean()
    assert (words / "tokenizer" / "vocab.txt").read_text().split() == digits.vocabulary()
    assert visual_words.read(words).shape == (visual_words.COUNT, visual_words.PATCH, visual_words.PATCH, 3)


def test_patches_are_cut_row_by_row():
    picture = np.arange(24 * 24, dtype=np.uint8).reshape(24, 24)
    rows = visual_words.patches(scenes.png(picture), 24, 4)
    np.testing.assert_array_equal(rows[7].reshape(4, 4, 3)[..., 1], picture[4:8, 4:8])


def test_one_digit_on_white_paper(folder):
    rows = read(folder, "digits_train.json")
    assert len(rows) == 30 and {row["label"] for row in rows} <= set(range(10))
    for row in rows:
        patches = visual_words.patches((folder / row["image"]).read_bytes())
        inked = np.argwhere((patches.min(axis=1) < 200).reshape(6, 6))
        assert (np.ptp(inked, axis=0) + 1).max() == 2 * row["scale"]  # patches: a scan is eight pixels high
        assert row["caption"] == f"a {digits.SCALES[row['scale']]} {scenes.NUMBERS[row['label']]}"
    assert {row["scale"] for row in rows} == set(digits.SCALES)
    assert {word for row in rows for word in row["caption"].split()} <= set(digits.vocabulary())


def test_half_of_the_captions_are_wrong(folder):
    rows, right = read(folder, "matches_test.json"), {}
    for row in read(folder.parent / "scenes", "caption_test.json"):
        right[row["image"]] = row["caption"][0]
    assert len(rows) == 2 * len(right) and sum(row["label"] for row in rows) == len(right)
    assert all((row["text"] == right[row["image"]]) == row["label"] for row in rows)


def test_sentences(folder):
    texts = [row["text"] for row in read(folder, "texts_train.json")]
    assert len(texts) == 120 and texts[0].startswith("a picture of a") and "? " in texts[-1]
    longest = max(len(text.replace("?", " ?").split()) for text in texts)
    assert longest + 2 <= 18
