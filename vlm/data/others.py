"""Examples that know the source they come from, for objectives that set one example against another."""

from __future__ import annotations

from typing import Any

from vlm.data.ledger import FatalDataError
from vlm.data.source import Source


class WithOthers:
    """A source whose examples also hold `others`, the source itself: a transform can read any other of its examples.

    Which one it reads should follow from the transform's `rng` alone; then random access stays exact.
    """

    def __init__(self, source: Source):
        self._source, self._others = source, _Others(source)
        self.name, self.fingerprint = source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "others": self._others}


class _Others:
    """The same source; storage that fails while an example is transformed is not that example's fault."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._source[index]
        except OSError as error:
            raise FatalDataError(f"{self._source.name}: sample {index}: {error}") from error
