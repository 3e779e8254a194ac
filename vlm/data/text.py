"""Texts of examples: taking one of several, and the cleaning that BLIP's captions and questions were trained with."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from vlm.errors import UserError

_MARKS = '.!"()*#:;~'
_TO_SPACES = str.maketrans(dict.fromkeys(_MARKS, " "))
_TO_NOTHING = str.maketrans(dict.fromkeys(_MARKS))
_SIDES = {"left": "right", "right": "left"}


def clean_caption(text: str, max_words: int) -> str:
    """BLIP's captions (Li et al. 2022, published code): lower case, `. ! " ( ) * # : ; ~` as spaces.

    Two or more white characters become one space (a single tab survives), both ends are stripped of spaces, the end of
    line ends before that; commas, hyphens, apostrophes and question marks stay. At most `max_words` words are kept.
    """
    text = re.sub(r"\s{2,}", " ", text.lower().translate(_TO_SPACES))
    return _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """BLIP's questions: like captions, but the marks are deleted ("5:30" → "530") and inner and leading spaces stay."""
    return _first_words(text.lower().translate(_TO_NOTHING).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])


def swap_sides(text: str) -> str:
    """Exchanges the words "left" and "right" (in lower case), for a pair of pictures that change places."""
    return re.sub(r"\b(left|right)\b", lambda match: _SIDES[match[1].lower()], text, flags=re.IGNORECASE)


def one_text(value: Any, rng: np.random.Generator | None, name: str) -> str:
    """Returns a text as a string; of several one that `rng` draws, or the first without it.

    Raises:
        UserError: no text, or bytes that are not UTF-8; `name` says whose.
    """
    if isinstance(value, (list, tuple, np.ndarray)):
        if not len(value):
            raise UserError(f"{name}: an empty list")
        value = value[int(rng.integers(len(value))) if rng is not None else 0]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{name}: not valid UTF-8") from None
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a string, found {type(value).__name__}")
    return value
