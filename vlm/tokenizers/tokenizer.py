"""What every tokenizer does alike: special tokens around the text, truncation, padding, NumPy batches."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.errors import UserError

Part = int | Literal["A", "B"]
"""One part of a template: a special token's id, or a slot for the first or the second text."""
Template = tuple[tuple[Part, int], ...]
"""Parts in order, each with its token type."""


class Tokenizer(abc.ABC):
    """Maps strings to token ids. Subclasses supply `encode`, `decode`, `save` and the attributes below.

    Attributes:
        vocab_size: number of ids, special and added tokens included.
        pad_id, bos_id, eos_id, unk_id, mask_id: special ids, or None where the vocabulary has none. For BERT,
            bos and eos are `[CLS]` and `[SEP]`.
        single, pair: where the special tokens stand around one text and around two.
        padding_side, truncation_side: "right" or "left".
    """

    vocab_size: int
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    mask_id: int | None = None
    single: Template = (("A", 0),)
    pair: Template = (("A", 0), ("B", 0))
    padding_side: str = "right"
    truncation_side: str = "right"

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text without the surrounding special tokens and without truncation."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its exact spelling in the vocabulary, or None."""

    @abc.abstractmethod
    def save(self, directory: str | Path) -> None:
        """Writes the files that `vlm.tokenizers.load` and Hugging Face's tokenizer classes read."""

    def __call__(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        padding: Literal["longest", "max_length"] = "longest",
        truncation: bool = True,
        pairs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Encodes a batch.

        Args:
            texts: B texts.
            max_length: limit on the length of a row, special tokens included.
            padding: up to the longest row of this batch, or up to `max_length`.
            truncation: cut texts so that rows fit in `max_length`; special tokens are kept. Of a pair, the
                longer text is cut first.
            pairs: B second texts, encoded into the same rows.

        Returns:
            `tokens` int32[B, L], `mask` bool[B, L] (true = real token) and, for pairs of a tokenizer that
            distinguishes them, `token_types` int32[B, L].

        Raises:
            UserError: an element is not valid text, lengths differ, or `max_length` cannot hold the special
                tokens.
        """
        if isinstance(texts, str) or isinstance(pairs, str):
            raise UserError("texts must be a list of strings, not one string")
        if pairs is not None and len(pairs) != len(texts):
            raise UserError(f"texts and pairs differ in number: {len(texts)} and {len(pairs)}")
        if padding not in ("longest", "max_length"):
            raise UserError(f"padding is 'longest' or 'max_length', found {padding!r}")
        if padding == "max_length" and max_length is None:
            raise UserError("padding='max_length' needs max_length")
        template = self.single if pairs is None else self.pair
        firsts = [self._ids(text, index) for index, text in enumerate(texts)]
        seconds = [self._ids(text, index) for index, text in enumerate(pairs)] if pairs is not None else []
        both = list(itertools.zip_longest(firsts, seconds, fillvalue=[]))
        if truncation and max_length is not None:
            both = self._fit(both, max_length - sum(part not in ("A", "B") for part, _ in template))
        return self._batch(template, both, (max_length or 0) if padding == "max_length" else 0)

    def _ids(self, text: str, index: int) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"text {index} must be a string, found {type(text).__name__}")
        try:
            return self.encode(text)
        except (UnicodeError, RuntimeError, TypeError) as error:  # what the libraries raise on lone surrogates
            if isinstance(error, UnicodeError) or any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"text {index} is not valid Unicode: {ascii(text[:40])}") from None
            raise

    def _fit(self, texts: list[tuple[list[int], list[int]]], budget: int) -> list[tuple[list[int], list[int]]]:
        """Cuts the texts of every row to `budget` ids together."""
        if budget < 0:
            raise UserError("max_length is too short for the special tokens alone")
        kept = []
        for first, second in texts:
            sizes = shares(len(first), len(second), budget)
            right = self.truncation_side == "right"
            rows = ((ids[:n] if right else ids[len(ids) - n :]) for ids, n in zip((first, second), sizes, strict=True))
            kept.append(tuple(rows))
        return kept

    def _batch(self, template: Template, texts: list[tuple[list[int], list[int]]], least: int) -> dict[str, np.ndarray]:
        """Puts the special tokens around the ids and pads all rows to the longest, or to `least`."""
        rows = [_fill(template, first, second) for first, second in texts]
        length = max([least, *map(len, rows)])
        if self.pad_id is None and any(len(row) < length for row in rows):
            raise UserError("this tokenizer has no padding token: load it with pad_id=...")
        tokens = np.full((len(rows), length), self.pad_id or 0, np.int32)
        mask = np.zeros(tokens.shape, np.bool_)
        spans = [slice(0, len(row)) for row in rows]
        if self.padding_side == "left":
            spans = [slice(length - len(row), length) for row in rows]
        for index, (span, row) in enumerate(zip(spans, rows, strict=True)):
            tokens[index, span] = row
            mask[index, span] = True
        batch = {"tokens": tokens, "mask": mask}
        if any(kind for _, kind in template):
            batch["token_types"] = np.zeros_like(tokens)
            for index, (span, (first, second)) in enumerate(zip(spans, texts, strict=True)):
                batch["token_types"][index, span] = _kinds(template, len(first), len(second))
        return batch


def _kinds(template: Template, first: int, second: int) -> list[int]:
    sizes = {"A": first, "B": second}
    return [kind for part, kind in template for _ in range(sizes.get(part, 1) if isinstance(part, str) else 1)]


def _fill(template: Template, first: list[int], second: list[int]) -> list[int]:
    row: list[int] = []
    for part, _ in template:
        if part == "A":
            row += first
        elif part == "B":
            row += second
        else:
            row.append(part)
    return row


def shares(first: int, second: int, budget: int) -> tuple[int, int]:
    """Returns how many ids each of two texts keeps: the longer one is cut first, then both evenly.

    An odd remainder goes to the longer text (to the second of two equals), as in the `tokenizers` library.
    """
    if first > second:
        second, first = shares(second, first, budget)
        return first, second
    if first + second <= budget:
        return first, second
    if first <= budget // 2:
        return first, budget - first
    return budget // 2, budget - budget // 2
