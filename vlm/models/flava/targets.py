"""What FLAVA learns from, as arrays of one example: another caption, labels, scores of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.annotations import read_answer_list
from vlm.data.ledger import FatalDataError
from vlm.data.text import one_text
from vlm.errors import UserError

_TRUTHS = {"true": 1, "false": 0}
_ATTEMPTS = 100


def other_caption(example: Mapping[str, Any], rng: np.random.Generator, name: str) -> str:
    """The text of another example of the same source, unlike every text of this one (torchmultimodal's negatives).

    Raises:
        FatalDataError: the example does not know its source, or a hundred others have no text or the same one.
    """
    others, own = example.get("others"), example["text"]
    if others is None:
        raise FatalDataError(f"{name}: image-text matching needs `others` (vlm.data.others), or itm_probability=0")
    known = {one_text(text, None, name) for text in (own if isinstance(own, (list, tuple, np.ndarray)) else [own])}
    for _ in range(_ATTEMPTS):
        try:
            text = one_text(others[int(rng.integers(len(others)))].get("text"), rng, f"{name}: other text")
        except FatalDataError:
            raise
        except UserError:  # unreadable, or without text
            continue
        if text not in known:
            return text
    raise FatalDataError(
        f"{name}: {_ATTEMPTS} other examples of its source have no text or the same; "
        "image-text matching needs different ones (itm_probability=0: without)"
    )


def class_label(value: Any, name: str, count: int | None = None) -> np.ndarray:
    """A class number int32[], of `count` classes, −1 for unknown; True and False, also as words, are 1 and 0.

    Raises:
        UserError: something else, or a class that is not among them; `name` says where.
    """
    value = _TRUTHS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if not isinstance(value, (int, np.integer, np.bool_)) or not -1 <= int(value) < 2**31:
        raise UserError(f"{name}: expected a class number, True or False, found {value!r:.80}")
    if count is not None and int(value) >= count:
        raise UserError(f"{name}: expected one of the classes 0 to {count - 1}, found {int(value)}")
    return np.asarray(int(value), np.int32)


def value_label(value: Any, name: str) -> np.ndarray:
    """A number float32[].

    Raises:
        UserError: something else; `name` says where.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(value, (bool, np.bool_)) or not np.isfinite(number):
        raise UserError(f"{name}: expected a number, found {value!r:.80}")
    return np.asarray(number, np.float32)


def answer_scores(value: Any, numbers: Mapping[str, int], name: str) -> np.ndarray:
    """The VQA accuracy float32[K] that each known answer would have.

    That is min(1, others who gave it / 3), averaged over leaving out each person: of ten people, 0.3, 0.6, 0.9 and 1
    for an answer that one, two, three or more gave (Antol et al. 2015; Teney et al. 2018). One string scores 1.

    Args:
        value: a list of people's answers, or one string; compared in lower case.
        numbers: number of each known answer, K in all.

    Raises:
        UserError: something else; `name` says where.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(text, str) for text in given):
        raise UserError(f"{name}: expected a string or a list of strings, found {value!r:.80}")
    scores, people = np.zeros(len(numbers), np.float32), len(given)
    for answer, count in Counter(text.strip().lower() for text in given).items():
        if answer in numbers:
            rest = min(1.0, (count - 1) / 3) * count + min(1.0, count / 3) * (people - count)
            scores[numbers[answer]] = 1.0 if people == 1 else rest / people
    return scores


def read_answers(path: str, count: int) -> list[str]:
    """The answers that a JSON file lists.

    Raises:
        UserError: not a list of `count` strings that differ in lower case.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file (expected a list of answers)")
    answers = read_answer_list(path)
    different = len({text.strip().lower() for text in answers})
    if not different == len(answers) == count:
        raise UserError(f"{path}: expected {count} different answers, found {different} of {len(answers)}")
    return answers
