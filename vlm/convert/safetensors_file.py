"""Reads safetensors files as lazy tensors and writes them slice by slice.

The format: eight bytes header length, a JSON header {name: {dtype, shape, data_offsets}}, the tensors without gaps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vlm.convert.views import TensorView, from_array
from vlm.errors import UserError
from vlm.strict import unique_keys

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(path: str | Path) -> dict[str, TensorView]:
    """Returns the tensors of a file by name, memory-mapped.

    The header is checked twice: by the `safetensors` library (size, nesting, offsets without overlap or hole) and
    here for what the library lets pass (duplicate names, dimensions that overflow).

    Raises:
        UserError: the file is damaged, hostile or uses a type that has no place in a parameter tree.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "np"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a valid safetensors file: {str(error)[:200]}") from None
    data = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(bytes(data[:8]), "little")
    try:
        header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=unique_keys)
    except ValueError as error:
        raise UserError(f"{path}: not a valid safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return {name: _view(path, data, 8 + length, name, entry) for name, entry in header.items()}


def _view(path: Path, data: np.ndarray, start: int, name: str, entry: dict[str, Any]) -> TensorView:
    if not name or len(name) > 512 or not name.isprintable():
        raise UserError(f"{path}: tensor name {name[:64]!r} is not printable text of at most 512 characters")
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has type {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if max(shape, default=0) >= 2**48 or len(shape) > 16 or math.prod(shape) * dtype.itemsize != end - begin:
        raise UserError(f"{path}: tensor {name!r} of shape {list(shape)} does not fill its {end - begin} bytes")
    return from_array(np.ndarray(shape, dtype, buffer=data, offset=start + begin))
