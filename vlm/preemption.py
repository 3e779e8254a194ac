"""Stopping in time: SIGTERM and SIGINT let the step finish and the state be saved; a second signal ends at once."""

from __future__ import annotations

import collections
import os
import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75  # the run is complete up to here and can be started again
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAG = 2  # steps between a signal on one host and the stop on all


class Preemption:
    """A context in which stop signals are remembered instead of obeyed."""

    def __init__(self, mesh: Any = None):
        """`mesh`: over the devices of all hosts, so that all stop after the same step; None on a single host."""
        self._requested = False
        self._previous: dict[int, Any] = {}
        self._answers: collections.deque[Any] = collections.deque()
        self._agree = _agreement(mesh) if mesh is not None else None

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

    def stop(self) -> bool:
        """Whether to stop now; call once per step. All hosts get the same answer at the same step.

        Between hosts the answer lags `LAG` steps, so that no step waits for it.
        """
        if self._agree is None:
            return self._requested
        self._answers.append(self._agree(self._requested))
        return len(self._answers) > LAG and bool(self._answers.popleft())


def _agreement(mesh: Any) -> Any:
    """A function that starts an "any of all hosts" and returns the result, not yet computed."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    local = len([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
    any_host = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def agree(requested: bool) -> Any:
        flags = np.full(local, requested, np.int32)
        return any_host(jax.make_array_from_process_local_data(split, flags, (mesh.size,)))

    return agree
