"""Writes lazy tensors as a PyTorch .pth file: {"model": state dict}, which `torch.load(weights_only=True)` reads.

The format since PyTorch 1.6: an uncompressed zip archive of one pickle, which only describes the tensors, and one
member for the bytes of each. Tensors are written block by block, so memory does not grow with the model.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from vlm.convert.views import TensorView, contiguous
from vlm.convert.writer import BLOCK_BYTES, Progress, slices
from vlm.errors import UserError

_ROOT = "model"
_STORAGES = {
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same bytes for the same tensors


def write_pth(path: Path, tensors: Mapping[str, TensorView], *, progress: Progress = lambda count: None) -> None:
    """Writes one file atomically.

    Raises:
        UserError: a type that PyTorch lacks.
    """
    description = _describe(tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(zipfile.ZipInfo(f"{_ROOT}/data.pkl", _EPOCH), description)
                archive.writestr(zipfile.ZipInfo(f"{_ROOT}/byteorder", _EPOCH), b"little")
                for number, view in enumerate(tensors.values()):
                    wide = view.nbytes >= 2**31
                    member = _aligned(f"{_ROOT}/data/{number}", file.tell(), wide)
                    with archive.open(member, "w", force_zip64=wide) as out:
                        for block in _blocks(view):
                            out.write(block)
                            progress(len(block))
                archive.writestr(zipfile.ZipInfo(f"{_ROOT}/version", _EPOCH), b"3\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _blocks(view: TensorView) -> Iterator[memoryview]:
    """The tensor's bytes in C order."""
    for index in slices(view.shape, view.dtype.itemsize, BLOCK_BYTES):
        yield contiguous(view.read(index)).reshape(-1).view(np.uint8).data


def _aligned(name: str, position: int, wide: bool) -> zipfile.ZipInfo:
    """A member whose bytes start at a multiple of 64 in the file, as in PyTorch's own, so that they can be mapped."""
    member = zipfile.ZipInfo(name, _EPOCH)
    start = position + 30 + len(name) + (20 if wide else 0) + 4
    padding = -start % 64
    member.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    return member


def _describe(tensors: Mapping[str, TensorView]) -> bytes:
    """The pickle, protocol 2, of {"model": {name: tensor}}."""
    out = [b"\x80\x02}", _text("model"), b"}("]
    for number, (name, view) in enumerate(tensors.items()):
        if view.dtype not in _STORAGES:
            raise UserError(f"{name}: PyTorch has no type {view.dtype}")
        strides = [int(np.prod(view.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(view.shape))]
        storage = [_text("storage"), _name("torch", _STORAGES[view.dtype]), _text(str(number)), _text("cpu")]
        arguments = [
            b"(",
            *(b"(", *storage, _number(view.size), b"tQ"),
            _number(0),
            *(b"(", *map(_number, view.shape), b"t"),
            *(b"(", *map(_number, strides), b"t"),
            b"\x89",  # requires no gradient
            _name("collections", "OrderedDict") + b")R",  # backward hooks: none
            b"t",
        ]
        out += [_text(name), _name("torch._utils", "_rebuild_tensor_v2"), *arguments, b"R"]
    return b"".join([*out, b"us."])


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
