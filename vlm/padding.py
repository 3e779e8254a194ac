"""Padding of texts that a training step does not compute: rows are cut to a common length, or packed end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm.errors import UserError

TEXT_KEYS = ("tokens", "mask", "token_types", "positions", "masked_tokens", "token_labels", "labels")
"""What has a column for every token of `tokens`, if its shape says so."""


@dataclasses.dataclass(frozen=True)
class TextLengths:
    """The lengths of text that a training step is compiled for; the shortest that will do is run.

    Attributes:
      lengths: besides the whole row's; without any, batches stay as they are.
      rows: 1: rows are cut to a length that all of them fit in. More: so many rows are packed together
        (`layers.packing`), and the length is that of their mean. The batch then has `packing`.
      micro_batches: rows i, i + A, i + 2A, … of a batch form one of A micro-batches; those of one are packed together.
    """

    lengths: tuple[int, ...] = ()
    rows: int = 1
    micro_batches: int = 1

    def check(self, rows: Sequence[int]) -> None:
        """Compares the lengths with those of the rows that examples give; without any, with nothing.

        Raises:
          UserError: a length that no row has.
        """
        longest = max(rows, default=None)
        if longest is not None and any(length > longest for length in self.lengths):
            expected = f"expected at most the {longest} tokens of a row"
            raise UserError(f"config.train.text_lengths: {expected}, found {self.lengths}")

    def sizes(self, batch: Mapping[str, Any]) -> list[int]:
        """The lengths for such a batch, ascending; the last is the whole row. Empty where it has no texts."""
        if not self.lengths or "mask" not in batch:
            return []
        whole = batch["mask"].shape[1]
        return sorted({length for length in self.lengths if length < whole} | {whole})

    def needed(self, mask: Any) -> Any:
        """The shortest length that would do for rows with this mask, bool[B, L]: a NumPy or traced integer."""
        xp = _numpy_of(mask)
        if self.rows == 1:
            return xp.max(xp.where(mask, xp.arange(1, mask.shape[1] + 1)[None], 1))
        return xp.max(-(-self._kept(mask).sum(axis=1) // self.rows))

    def shorten(self, batch: Mapping[str, Any], length: int) -> dict[str, Any]:
        """The batch with texts of this length: their first columns, or all columns and how they are packed."""
        whole = batch["mask"].shape[:2]
        if self.rows > 1:
            return dict(batch) if length == whole[1] else {**batch, "packing": self._packing(batch["mask"], length)}
        return {
            name: value[:, :length] if name in TEXT_KEYS and value.shape[:2] == whole else value
            for name, value in batch.items()
        }

    def fit(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch (NumPy arrays) shortened as far as its texts allow; of one host, which has all rows."""
        sizes = self.sizes(batch)
        if not sizes:
            return batch
        return self.shorten(batch, sizes[np.searchsorted(sizes, self.needed(batch["mask"]))])

    def _kept(self, mask: Any) -> Any:
        """bool[G, rows · L]: the real tokens, and the first of each row, which encoders read, of the rows that are
        packed together, end to end; a group is of one micro-batch.
        """
        batch, length = mask.shape
        kept = mask | (_numpy_of(mask).arange(length)[None] == 0)
        dealt = kept.reshape(-1, self.rows, self.micro_batches, length).swapaxes(1, 2)
        return dealt.reshape(batch // self.rows, self.rows * length)

    def _packing(self, mask: Any, length: int) -> Any:
        """int32[G, rows · length], see `layers.packing`: the places of what is kept, then those of padding."""
        order = _numpy_of(mask).argsort(~self._kept(mask), axis=1, stable=True)
        return order[:, : self.rows * length].astype(np.int32)


def _numpy_of(array: Any) -> Any:
    return jnp if isinstance(array, jax.Array) else np
