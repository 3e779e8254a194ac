"""What BLIP's tasks learn from, as arrays of one example: answers with weights, image numbers, labels."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.tokenizers import Tokenizer

_TRUTHS = {"true": 1, "false": 0}


def answers(
    value: Any, tokenizer: Tokenizer, name: str, *, size: int, length: int, single_weight: float
) -> dict[str, np.ndarray]:
    """The different answers to a question, each with the share of the people who gave it.

    Args:
        value: a list of people's answers, or one string, which weighs `single_weight`.
        size, length: rows, of which the most frequent answers get one each, and tokens of a row.

    Returns:
        `answer_tokens` int32[size, length], `answer_mask` bool[size, length], `answer_weights` float32[size]. Rows
        beyond the answers hold [CLS] alone and weigh 0.

    Raises:
        UserError: something else; `name` says where.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(text, str) for text in given):
        raise UserError(f"{name}: expected a string or a list of strings, found {value!r:.80}")
    one = single_weight if isinstance(value, str) else 1 / len(given)
    kept = collections.Counter(given).most_common(size)
    rows = tokenizer([text for text, _ in kept], max_length=length, padding="max_length")
    # Padding keeps one real token, so that attention always has something to look at.
    tokens = np.full((size, length), tokenizer.pad_id, np.int32)
    mask, weights = np.zeros((size, length), np.bool_), np.zeros(size, np.float32)
    tokens[:, 0], mask[:, 0] = tokenizer.bos_id or 0, True
    tokens[: len(kept)], mask[: len(kept)] = rows["tokens"], rows["mask"]
    weights[: len(kept)] = [count * one for _, count in kept]
    return {"answer_tokens": tokens, "answer_mask": mask, "answer_weights": weights}


def image_id(example: Mapping[str, Any], name: str) -> np.ndarray:
    """The number of the example's image, int32[]: `image_number`, or else `image_id`.

    Raises:
        UserError: neither is a number.
    """
    value = example.get("image_number", example.get("image_id"))
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**31:
        raise UserError(
            f"{name}: image_id: expected a number below 2^31, found {value!r:.80}"
            " (a source of kind 'json' numbers names with number='image_id')"
        )
    return np.asarray(value, np.int32)


def label(value: Any, name: str, count: int | None = None) -> np.ndarray:
    """A class number int32[], of `count` classes; True and False, also as words, are 1 and 0.

    Raises:
        UserError: something else, or a class that is not among them; `name` says where.
    """
    value = _TRUTHS.get(value.strip().lower(), value) if isinstance(value, str) else value
    if not isinstance(value, (int, np.integer, np.bool_)) or not 0 <= int(value) < 2**31:
        raise UserError(f"{name}: expected a class number, True or False, found {value!r:.80}")
    if count is not None and int(value) >= count:
        raise UserError(f"{name}: expected one of the classes 0 to {count - 1}, found {int(value)}")
    return np.asarray(int(value), np.int32)
