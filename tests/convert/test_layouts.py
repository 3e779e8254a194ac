"""A layout is told by its marks; an unknown one is shown, not guessed."""

import pytest

from vlm.convert.layouts import Layout, detect
from vlm.errors import UserError

LAYOUTS = (Layout("whole", (r"text\.", r"vision\."), ()), Layout("tower", (r"(vision\.)?patch$",), ()))


def test_first_layout_whose_marks_are_all_there():
    assert detect(LAYOUTS, ["text.a", "vision.patch"], "x").name == "whole"
    assert detect(LAYOUTS, ["vision.patch"], "x").name == "tower"
    assert detect(LAYOUTS, ["patch", "other"], "x").name == "tower"


def test_unknown_layout_is_shown():
    with pytest.raises(
        UserError, match="file: unknown layout with tensors a, b, c, d and 1 more; known layouts: whole"
    ):
        detect(LAYOUTS, ["e", "d", "c", "b", "a"], "file")
