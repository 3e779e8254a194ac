"""Stopping in time: SIGTERM and SIGINT let the step finish and the state be saved; a second signal ends at once.

Several hosts stop after the same step, also where one of them fails: each tells the others, in a small collective
beside every step, whether it can go on.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from vlm.errors import UserError

EXIT_PREEMPTED = 75  # the run is complete up to here and can be started again
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAG = 2  # steps between what happens on one host and the stop on all
GO, STOP, FAILED = range(3)  # what a host tells the others; the highest counts

Item = TypeVar("Item")


class Stopped(BaseException):
    """A stop signal came; not an `Exception`, so that nobody takes it for a failure of what it interrupts."""


class Preemption:
    """A context in which stop signals are remembered instead of obeyed."""

    def __init__(self, mesh: Any = None):
        """`mesh`: over the devices of all hosts, so that all stop after the same step; None on a single host."""
        self._requested, self._interrupting = False, False
        self._previous: dict[int, Any] = {}
        self._several = _agreement(mesh) if mesh is not None else None
        self.lag = LAG if mesh is not None else 0

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            os._exit(128 + number)
        self._requested = True
        os.write(2, b"\nstopping after this step and saving; a second signal stops at once\n")
        if self._interrupting:
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside it a stop signal, also an earlier one, raises `Stopped` at once: in a long wait, or in work that may
        be lost. Nothing in it may be common to several hosts, of which only some get the signal.
        """
        self._interrupting = True
        try:
            if self._requested:
                raise Stopped
            yield
        finally:
            self._interrupting = False

    def poll(self) -> None:
        """Raises `Stopped` on all hosts once one of them got a signal. All call it together, and wait for it."""
        if int(self._agree(STOP if self._requested else GO)):
            raise Stopped

    def _agree(self, word: int) -> Any:
        """The highest word of all hosts; `int` waits for it."""
        return word if self._several is None else self._several(word)

    def in_step(self, draw: Callable[[], Item], count: int) -> Iterator[Item]:
        """Yields `count` results of `draw`, each when every host is known to have its own.

        It ends early, on all hosts after the same item, when a host gets a stop signal; `draw` is interrupted. Items
        are drawn `lag` ahead, so that a host which can draw no more still has those that the others have begun, and
        no step waits for the answer.

        Raises:
            Exception: what `draw` raised; on the other hosts a UserError, after the same item.
        """
        ahead: collections.deque[tuple[Item | None, Any]] = collections.deque()
        word, failure = GO, None
        for number in range(count + self.lag):
            item = None
            if word == GO and number < count:
                try:
                    with self.interrupting():
                        item = draw()
                except Stopped:
                    word = STOP
                except Exception as error:  # whatever it is, the others must hear of it
                    word, failure = FAILED, error
            ahead.append((item, self._agree(word)))
            if number < self.lag:
                continue
            item, answer = ahead.popleft()
            agreed = int(answer)
            if agreed == FAILED:
                raise failure or UserError("another host failed and says why")
            if agreed == STOP:
                return
            yield item  # type: ignore[misc]


def _agreement(mesh: Any) -> Callable[[int], Any]:
    """A function that starts a "highest of all hosts" and returns the result, not yet computed."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    local = len([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
    highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def agree(word: int) -> Any:
        words = np.full(local, word, np.int32)
        return highest(jax.make_array_from_process_local_data(split, words, (mesh.size,)))

    return agree
