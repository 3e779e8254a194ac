"""Rows of visual dialog: the rounds so far, the question and a candidate answer (Li et al. 2022, section 5.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.tokenizers import Tokenizer


def rows(
    example: Mapping[str, Any], options: Sequence[int] | None, tokenizer: Tokenizer, clean: Callable[[str], str],
    length: int, name: str,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`[CLS] question ? answer [SEP] … question ? candidate [SEP]`, of every candidate.

    Earlier rounds are read whole, as many of the latest as the longest candidate leaves room for, so that all
    candidates are read with the same ones.

    Args:
        example: `history`, `question` and `options`, see `vlm.data.visdial`.
        options: places of the candidates; None: all of them.

    Returns:
        `tokens` int32[A, length], `mask` bool[A, length].

    Raises:
        UserError: the example has none of them; `name` says which example.
    """
    given, history, question = (example.get(key) for key in ("options", "history", "question"))
    if not isinstance(question, str) or not isinstance(given, (list, tuple)) or not isinstance(history, (list, tuple)):
        raise UserError(f"{name}: expected question, history and options of a dialog, found {', '.join(example)}")

    def turn(question: str, answer: str) -> list[int]:
        return tokenizer.encode(f"{clean(question).rstrip(' ?')} ? {clean(answer)}")

    start, end = tokenizer.bos_id or 0, tokenizer.eos_id or 0
    chosen = [given[option] for option in options] if options is not None else given
    candidates = [[*turn(question, answer)[: length - 2], end] for answer in chosen]
    room, before = length - 1 - max(map(len, candidates)), list[int]()
    for earlier in reversed(history):
        tokens = [*turn(*earlier), end]
        if len(tokens) + len(before) > room:
            break
        before = tokens + before
    found = np.full((len(candidates), length), tokenizer.pad_id or 0, np.int32)
    mask = np.zeros(found.shape, np.bool_)
    for row, candidate in enumerate(candidates):
        ids = [start, *before, *candidate]
        found[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return {"tokens": found, "mask": mask}


def draw(example: Mapping[str, Any], rng: np.random.Generator | None, name: str) -> tuple[int, bool]:
    """The place of a candidate answer, and whether it is the right one: that one, or as often any wrong one.

    Raises:
        UserError: the example does not tell which is right.
    """
    right, options = example.get("answer"), example.get("options") or ()
    if not isinstance(right, int) or not 0 <= right < len(options):
        raise UserError(f"{name}: answer: expected the place of the right one in options, found {right!r:.60}")
    if rng is None or len(options) == 1 or rng.random() < 0.5:
        return right, True
    wrong = int(rng.integers(len(options) - 1))
    return wrong + (wrong >= right), False
