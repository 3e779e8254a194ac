"""Worker threads that make batches ahead of their use, in stream order, and stop when told or abandoned."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from vlm.data.batch import Batch, BatchBuilder, LoaderSettings, Row
from vlm.data.ledger import Skip, SkipLedger
from vlm.errors import UserError


class Plan(Protocol):
    """What has to be made; `loader.Loader` is one."""

    settings: LoaderSettings
    ledger: SkipLedger

    @property
    def num_steps(self) -> int | None:
        """Number of batches, None without end."""
        ...

    def draws(self, step: int) -> list[tuple[int, int, int, int, bool]]:
        """Arguments of `load_row` for the rows of one batch."""
        ...

    def load_row(self, position: int, source: int, sample: int, epoch: int, valid: bool) -> Row:
        """Makes one row."""
        ...


class Batches:
    """Iterator over a loader's batches from a given step on.

    Attributes:
        step: number of the next batch; after a batch was taken, the step to resume from.
        wait_seconds: total time that `next` waited for data.
        draws, skipped: rows taken so far, and how many examples were unreadable on the way.
    """

    def __init__(self, loader: Plan, start_step: int):
        self.step, self.wait_seconds, self.draws, self.skipped = start_step, 0.0, 0, 0
        self._loader = loader
        self._pool = _Pool(loader, start_step) if loader.settings.num_workers else None
        # Threads hold the pool, not this object: dropping it without close() stops them too.
        self._finalizer = weakref.finalize(self, self._pool.close) if self._pool else None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            StopIteration: the evaluation pass is complete, or the iterator was closed.
            UserError: too many unreadable examples, rows that do not fit together, or no batch within the timeout.
            Exception: whatever a worker died of, as soon as it did.
        """
        steps = self._loader.num_steps
        if (steps is not None and self.step >= steps) or (self._pool and self._pool.closed):
            self.close()
            raise StopIteration
        began = time.monotonic()
        try:
            builder = self._pool.take() if self._pool else _make(self._loader, self.step)
            self.wait_seconds += time.monotonic() - began
            self._account(builder.skips())
            batch = builder.finish()
        except BaseException:
            self.close()
            raise
        self.step += 1
        return batch

    def _account(self, skips: list[tuple[Skip, ...]]) -> None:
        """Ledger and limit follow the stream's order, so that they do not depend on how threads were scheduled."""
        settings, steps = self._loader.settings, self._loader.num_steps
        for row in skips:
            self.draws += 1
            for skip in row:
                new = self._loader.ledger.add(skip)
                self.skipped += int(new or steps is None)  # rows that fill up an evaluation's last batch repeat some
                seen = max(self.draws, settings.skip_window) if steps is None else steps * len(skips)
                limit = settings.max_skip_fraction * seen
                if self.skipped > limit:
                    raise UserError(
                        f"{self.skipped} of {self.draws} examples were unreadable, more than max_skip_fraction="
                        f"{settings.max_skip_fraction:g} allows; the last: {skip.source} sample {skip.sample}: "
                        f"{skip.error}"
                    )

    def close(self) -> None:
        """Stops the threads and waits for them; further batches are not made. May be called twice."""
        if self._finalizer:
            self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _make(loader: Plan, step: int) -> BatchBuilder:
    draws = loader.draws(step)
    builder = BatchBuilder(len(draws))
    for number, draw in enumerate(draws):
        builder.put(number, loader.load_row(*draw))
    return builder


class _Pool:
    """Threads that take rows of the next batches one by one and put them into place."""

    def __init__(self, loader: Plan, start_step: int):
        self.closed = False
        self._loader, self._next = loader, start_step
        self._condition = threading.Condition()
        self._opened = start_step  # first step whose rows are not yet handed out
        self._todo: list[tuple[int, int, tuple[int, int, int, int, bool]]] = []  # rows of the opened steps, last first
        self._building: dict[int, BatchBuilder] = {}
        self._ready: dict[int, BatchBuilder] = {}
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"loader-{i}", daemon=True)
            for i in range(loader.settings.num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> BatchBuilder:
        """Returns the next batch; watches over the wait."""
        settings, began, warned = self._loader.settings, time.monotonic(), False
        with self._condition:
            while self._next not in self._ready and self._error is None and not self.closed:
                waited = time.monotonic() - began
                if waited >= settings.timeout_seconds:
                    raise UserError(f"no batch for {waited:.0f} s (timeout_seconds): a worker or the storage hangs")
                if waited >= settings.watchdog_seconds and not warned:
                    warned = True
                    _dump_stacks(waited, self._next)
                until = settings.timeout_seconds if warned else min(settings.watchdog_seconds, settings.timeout_seconds)
                self._condition.wait(until - waited)
            if self._error is not None:
                raise self._error
            if self.closed:
                raise StopIteration
            result = self._ready.pop(self._next)
            self._next += 1
            self._condition.notify_all()
            return result

    def close(self) -> None:
        """Wakes and joins the threads; one that hangs in a system call is left behind (it is a daemon)."""
        with self._condition:
            self.closed = True
            self._todo.clear()
            self._ready.clear()
            self._condition.notify_all()
        deadline = time.monotonic() + 5
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _claim(self) -> tuple[int, int, tuple[int, int, int, int, bool]] | None:
        """Waits for a row to make; None at the end."""
        steps = self._loader.num_steps
        with self._condition:
            while not self.closed and self._error is None:
                if self._todo:
                    return self._todo.pop()
                ahead = self._opened < self._next + self._loader.settings.prefetch
                if ahead and (steps is None or self._opened < steps):
                    draws = self._loader.draws(self._opened)
                    self._building[self._opened] = BatchBuilder(len(draws))
                    self._todo = [(self._opened, i, draw) for i, draw in reversed(list(enumerate(draws)))]
                    self._opened += 1
                else:
                    self._condition.wait()
        return None

    def _work(self) -> None:
        try:
            while (claimed := self._claim()) is not None:
                step, number, draw = claimed
                builder = self._building[step]
                if builder.put(number, self._loader.load_row(*draw)):
                    with self._condition:
                        self._ready[step] = self._building.pop(step)
                        self._condition.notify_all()
        except BaseException as error:  # also SystemExit: a thread that is gone must not look like a slow one
            with self._condition:
                self._error = self._error or error
                self._condition.notify_all()


def _dump_stacks(waited: float, step: int) -> None:
    print(f"data: no batch for {waited:.0f} s (step {step}); stacks of all threads:", file=sys.stderr, flush=True)
    try:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    except (AttributeError, ValueError, OSError):  # stderr was replaced by something without a descriptor
        faulthandler.dump_traceback(file=2, all_threads=True)
