"""Decisions that all processes of a run must share: one looks at the disk, all act alike."""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm.errors import UserError

_ALONE = contextvars.ContextVar("_ALONE", default=False)  # while what only the first process runs is running


def is_primary() -> bool:
    """Whether this process is the one that names, deletes and verifies files."""
    return jax.process_index() == 0


def from_primary(function: Callable[[], Any]) -> Any:
    """Runs `function` on the first process only and returns its JSON-like result on all of them.

    Raises:
        UserError: on every process, when `function` raised one or an `OSError`.
        RuntimeError: on every process, when it raised anything else or its result is not JSON-like. No process is
            left waiting for another; for that reason too, when `function` itself wants to hear from the others.
    """
    _refuse_alone()
    if jax.process_count() == 1:
        try:
            return _alone(function)
        except OSError as error:
            raise UserError(_line(error)) from error
    data = b""
    if is_primary():
        try:
            data = json.dumps({"value": _alone(function)}).encode()
        except UserError as error:
            data = json.dumps({"error": str(error)}).encode()
        except OSError as error:
            data = json.dumps({"error": _line(error)}).encode()
        except Exception as error:  # whatever it is, the others must hear of it
            data = json.dumps({"bug": f"{type(error).__name__}: {error}"}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data, np.uint8) if is_primary() else np.zeros(size, np.uint8)
    outcome: dict[str, Any] = json.loads(
        np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
    )
    if "error" in outcome:
        raise UserError(outcome["error"])
    if "bug" in outcome:
        raise RuntimeError(outcome["bug"])
    return outcome["value"]


def on_every_process(function: Callable[[], Any]) -> Any:
    """Runs `function` on every process, each on its own, waits for all, and returns its result on each.

    Raises:
        UserError: on every process, when one of them raised anything: there that, elsewhere that another one failed.
    """
    value, failure = None, None
    try:
        value = function()
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    if any_process(failure is not None):
        raise failure or UserError("another host failed and says why")
    return value


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All of them must call it together."""
    _refuse_alone()
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def _line(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror or str(error)


def _alone(function: Callable[[], Any]) -> Any:
    token = _ALONE.set(True)
    try:
        return function()
    finally:
        _ALONE.reset(token)


def _refuse_alone() -> None:
    """In a run of one process too, so that it shows without others that would wait for ever."""
    if _ALONE.get():
        raise RuntimeError("what only the first process runs cannot ask the others")
