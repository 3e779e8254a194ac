"""Decisions that all processes of a run must share: one looks at the disk, all act alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm.errors import UserError


def is_primary() -> bool:
    """Whether this process is the one that names, deletes and verifies files."""
    return jax.process_index() == 0


def from_primary(function: Callable[[], Any]) -> Any:
    """Runs `function` on the first process only and returns its JSON-like result on all of them.

    Raises:
        UserError: on every process, when `function` raised one or an `OSError`.
        RuntimeError: on every process, when it raised anything else. No process is left waiting for another.
    """
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    if is_primary():
        try:
            outcome = {"value": function()}
        except (UserError, OSError) as error:
            outcome = {"error": str(error)}
        except Exception as error:  # whatever it is, the others must hear of it
            outcome = {"bug": f"{type(error).__name__}: {error}"}
    data = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data, np.uint8) if is_primary() else np.zeros(size, np.uint8)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    if "bug" in outcome:
        raise RuntimeError(outcome["bug"])
    return outcome["value"]


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. All of them must call it together."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))
