"""Parameters of a training run as lazy arrays, one in memory at a time: conversion of a run of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlm.checkpoint.leaves import Records
from vlm.checkpoint.reading import check_files, find_step, read_on_host, wrong_values
from vlm.convert.views import Index, TensorView
from vlm.errors import UserError
from vlm.manifest import verify_manifest


def lazy_params(path: str | Path, part: str = "params") -> dict[str, TensorView]:
    """The parameters of a run by path, read when they are asked for and verified against their fingerprints.

    The leaf that was read last stays in memory until another is wanted, so whoever reads block by block should finish
    one parameter before the next. The step is chosen now: a run that goes on saving does not mix two of them.

    Args:
        path: a training workdir (its newest step) or a step directory.
        part: of the training state: "params" or "extra".

    Raises:
        UserError: no checkpoint there, or a damaged one; on reading, the file or the leaf that is damaged.
    """
    step = find_step(path)
    records: Records = check_files(step)["extra"]["leaves"]
    current: dict[str, np.ndarray] = {}

    def whole(name: str) -> np.ndarray:
        if name not in current:
            current.clear()  # first: the old leaf and the new one are never there together
            current[name] = _read(step, name, records[name])
        return current[name]

    names = [name for name in records if name.startswith(f"{part}/")]
    return {name.removeprefix(f"{part}/"): _view(name, records[name], whole) for name in names}


def _view(name: str, record: dict[str, Any], whole: Callable[[str], np.ndarray]) -> TensorView:
    def fetch(index: Index) -> np.ndarray:
        return np.array(
            whole(name)[index], order="C"
        )  # a copy: a block that waits to be written must not hold the leaf

    return TensorView(tuple(record["shape"]), _dtype(record), fetch)


def _read(step: Path, name: str, record: dict[str, Any]) -> np.ndarray:
    if not math.prod(record["shape"]):  # orbax does not store empty arrays
        return np.zeros(record["shape"], _dtype(record))
    try:
        array = read_on_host(step, {name: record})[name]
    except Exception:
        verify_manifest(step, "full")  # a damaged file is the likely cause, and this names it
        raise
    if wrong_values(array, record):
        verify_manifest(step, "full")
        raise UserError(f"{step}: values differ from those that were saved: {name}")
    return array


def _dtype(record: dict[str, Any]) -> np.dtype:
    return np.dtype(jnp.dtype(record["dtype"]))
