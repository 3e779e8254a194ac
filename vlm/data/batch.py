"""What a loader is told, and how rows become a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
        max_skip_fraction: share of unreadable draws above which the run stops. Counted since the iteration began,
            on this host, in stream order: stops when skipped > fraction * max(draws, skip_window). The window
            keeps one bad record among the first few from counting as a large share; 0 tolerates none.
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


def collate(rows: Sequence[Row]) -> Batch:
    """Stacks rows; every row must have the first one's fields, shapes and dtypes.

    Raises:
        UserError: a row differs; the line names the example and the field.
    """
    first = rows[0].arrays
    for row in rows[1:]:
        if row.arrays.keys() != first.keys():
            raise UserError(f"{row.label}: has fields {sorted(row.arrays)}, others have {sorted(first)}")
        for name, value in row.arrays.items():
            if value.shape != first[name].shape or value.dtype != first[name].dtype:
                raise UserError(
                    f"{row.label}: {name!r} is {value.dtype}{list(value.shape)}, "
                    f"others are {first[name].dtype}{list(first[name].shape)}"
                )
    return {name: np.stack([row.arrays[name] for row in rows]) for name in first}
