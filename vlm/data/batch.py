"""What a loader is told, and how rows become a batch."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from vlm.data.ledger import Skip
from vlm.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """How batches are made; only `batch_size` and `seed` change what they hold.

    Attributes:
        batch_size: rows of the global batch, over all hosts.
        seed: chooses order and augmentation.
        num_workers: threads; 0 works in the caller's thread.
        prefetch: batches made ahead of the one in use.
        host_index, host_count: which share of each batch this process reads.
        max_skip_fraction: share of unreadable draws, of this host, above which the run stops; 0 tolerates none. Of an
            evaluation it is the share of its whole pass. In training it is counted since the iteration began, in stream
            order: stops when skipped > fraction * max(draws, skip_window). The window keeps one bad record among the
            first few from counting as a large share.
        skip_window: see above, in draws.
        watchdog_seconds: with no batch for so long, the stacks of all threads are printed to stderr, once per wait.
        timeout_seconds: with no batch for so long, the run stops.
    """

    batch_size: int
    seed: int = 0
    num_workers: int = 8
    prefetch: int = 2
    host_index: int = 0
    host_count: int = 1
    max_skip_fraction: float = 0.001
    skip_window: int = 1000
    watchdog_seconds: float = 300.0
    timeout_seconds: float = 1800.0

    def __post_init__(self):
        if self.batch_size < 1 or self.host_count < 1 or self.batch_size % self.host_count:
            raise UserError(f"batch_size {self.batch_size} does not divide over {self.host_count} hosts")
        if not 0 <= self.host_index < self.host_count:
            raise UserError(f"host_index {self.host_index} of {self.host_count} hosts")
        if self.num_workers < 0 or self.prefetch < 1:
            raise UserError(f"num_workers {self.num_workers} must be >= 0 and prefetch {self.prefetch} >= 1")
        if not 0 <= self.max_skip_fraction <= 1 or self.skip_window < 1:
            raise UserError(f"max_skip_fraction must be in [0, 1], found {self.max_skip_fraction}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be in [0, 2^63), found {self.seed}")
        if min(self.watchdog_seconds, self.timeout_seconds) <= 0:
            raise UserError("watchdog_seconds and timeout_seconds must be positive")

    @property
    def rows(self) -> int:
        """Rows of a batch on this host."""
        return self.batch_size // self.host_count


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch before collation, and the examples that were skipped on the way to it."""

    label: str
    arrays: dict[str, np.ndarray]
    skips: tuple[Skip, ...]


class BatchBuilder:
    """A batch under construction: rows are copied into place as they are finished, from any thread.

    Rows must have the same fields, shapes and dtypes. Rows that do not fit are kept until all are in, so that the
    error names the odd one out and not whichever thread came second.
    """

    def __init__(self, count: int):
        self._count, self._missing = count, count
        self._lock = threading.Lock()
        self._batch: Batch | None = None
        self._labels: dict[int, str] = {}
        self._odd: dict[int, Row] = {}
        self._skips: dict[int, tuple[Skip, ...]] = {}

    def put(self, number: int, row: Row) -> bool:
        """Copies row `number` into place; returns whether it was the last one missing."""
        with self._lock:
            if self._batch is None:
                self._batch = {k: np.empty((self._count, *v.shape), v.dtype) for k, v in row.arrays.items()}
            batch = self._batch
        if _difference(row, batch):
            self._odd[number] = row
        else:
            for name, value in row.arrays.items():
                batch[name][number] = value
            self._labels[number] = row.label
        with self._lock:
            if row.skips:
                self._skips[number] = row.skips
            self._missing -= 1
            return not self._missing

    def skips(self) -> list[tuple[Skip, ...]]:
        """Returns what was skipped on the way to each row."""
        return [self._skips.get(number, ()) for number in range(self._count)]

    def finish(self) -> Batch:
        """Returns the batch of all rows.

        Raises:
            UserError: a row differs from most others; the line names the example and the field.
        """
        assert self._batch is not None and not self._missing
        if not self._odd:
            return self._batch
        first = min(self._odd)
        if len(self._odd) <= len(self._labels):
            raise UserError(f"{self._odd[first].label}: {_difference(self._odd[first], self._batch)}")
        # The row that came first is in the minority: describe it against one of the others.
        number = min(self._labels)
        usual = {name: value[None] for name, value in self._odd[first].arrays.items()}
        arrays = {name: value[number] for name, value in self._batch.items()}
        raise UserError(f"{self._labels[number]}: {_difference(Row('', arrays, ()), usual)}")


def _difference(row: Row, batch: Batch) -> str:
    """Says how a row differs from the rows of a batch; empty when it fits."""
    if row.arrays.keys() != batch.keys():
        return f"has fields {sorted(row.arrays)}, others have {sorted(batch)}"
    for name, value in row.arrays.items():
        usual = batch[name]
        if value.shape != usual.shape[1:] or value.dtype != usual.dtype:
            return f"{name!r} is {value.dtype}{list(value.shape)}, others are {usual.dtype}{list(usual.shape[1:])}"
    return ""
