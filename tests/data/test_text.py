"""Cleaning of captions and questions: the published code's every edge."""

import numpy as np
import pytest

from vlm.data.text import clean_caption, clean_question, one_text, swap_sides
from vlm.errors import UserError

EDGE = "A man, riding (on) a horse!!  Fast..."


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        (EDGE, "a man, riding on a horse fast", "a man, riding on a horse  fast"),
        ("At 5:30, isn't it well-lit?", "at 5 30, isn't it well-lit?", "at 530, isn't it well-lit?"),
        ("  lead  and trail  ", "lead and trail", "  lead  and trail"),
        ("one\ttab \t two\n\n", "one\ttab two", "one\ttab \t two\n\n"),
        ("ends in a line\n", "ends in a line", "ends in a line\n"),
        ('"#1*" ~x; (y)', "1 x y", "1 x y"),
        ("...", "", ""),
        ("", "", ""),
    ],
)
def test_cleaning(text, caption, question):
    assert clean_caption(text, 30) == caption
    assert clean_question(text) == question


def test_words_are_counted_between_single_spaces():
    assert clean_caption("a b  c d", 3) == "a b c"
    assert clean_caption("a\tb c d", 2) == "a\tb c"
    assert clean_question("a  b c", 2) == "a "  # the empty word between two spaces counts
    assert len(clean_question("w " * 80).split()) == 50


def test_sides_are_exchanged_as_whole_words():
    text = "the left, or right: leftover upright left-hand dogs"
    assert swap_sides(text) == "the right, or left: leftover upright right-hand dogs"
    assert swap_sides(swap_sides(text)) == text
    assert swap_sides("Left image") == "right image"


def test_one_text_of_several():
    assert one_text(["a", "b"], None, "x") == "a"
    assert {one_text(["a", "b"], np.random.default_rng(seed), "x") for seed in range(9)} == {"a", "b"}
    assert one_text("é".encode(), None, "x") == "é"
    for value, message in (([], "an empty list"), (3, "expected a string, found int"), (b"\xff", "not valid UTF-8")):
        with pytest.raises(UserError, match=f"record 4: {message}"):
            one_text(value, None, "record 4")
