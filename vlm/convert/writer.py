"""Writes lazy tensors as safetensors, block by block, with checksums taken on the way.

Memory stays near a few blocks whatever the size of the model: a block is read from its source, then hashed and
written by two threads while the next one is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vlm.convert.safetensors_file import DTYPE_NAMES
from vlm.convert.views import Index, TensorView, contiguous
from vlm.errors import UserError
from vlm.manifest import fsync_directory, write_atomically

BLOCK_BYTES = 16 * 2**20
_WRITE_BYTES = 2**20  # larger single writes took several times the system time here (Linux 6, ext4)
MAX_SHARD_BYTES = 50 * 10**9
_FLUSH_BYTES = 256 * 2**20
_PENDING = 3
# The order in which the safetensors library stores types, so that files are byte-identical with its own.
_ORDER = ("U64", "I64", "F64", "U32", "F32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")

Progress = Callable[[int], Any]


def write_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, TensorView],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda count: None,
) -> dict[str, str]:
    """Writes `<stem>.safetensors`, or shards and `<stem>.safetensors.index.json`, and returns their SHA-256 by name.

    Args:
        folder: an existing folder.
        stem: "model", "params".
        metadata: the header's `__metadata__`; transformers wants {"format": "pt"}.
        max_shard_bytes: tensors are spread over several files when they are larger together; a single larger tensor
            has a file of its own.
        progress: called with the number of bytes of every block written.

    Raises:
        UserError: a type that the format lacks; the disk is full.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (_ORDER.index(_type(*item)), item[0])))
    shards = _shards(ordered, max_shard_bytes)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[name] = write_safetensors(folder / name, shard, metadata=metadata, progress=progress)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(view.nbytes for view in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        data = json.dumps(index, indent=2).encode()
        write_atomically(folder / f"{stem}.safetensors.index.json", data)
        digests[f"{stem}.safetensors.index.json"] = hashlib.sha256(data).hexdigest()
    return digests


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorView],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = lambda count: None,
) -> str:
    """Writes one file atomically (temporary name, fsync, rename) in the given order; returns its SHA-256."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, view in tensors.items():
        begin, end = end, end + view.nbytes
        header[name] = {"dtype": _type(name, view), "shape": list(view.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            _reserve(file.fileno(), len(start) + end)
            digest = _stream(file, start, tensors, progress)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: disk full: {len(start) + end} bytes are needed") from None
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
    return digest


def _reserve(descriptor: int, size: int) -> None:
    """Allocates the file at once, so that a full disk is noticed before the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _stream(file: Any, start: bytes, tensors: Mapping[str, TensorView], progress: Progress) -> str:
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as flusher:
        pending: deque[tuple[Future[None], Future[None], int]] = deque()
        unflushed, flushed = 0, flusher.submit(int)

        def settle(left: int) -> None:
            while len(pending) > left:
                hashed, written, count = pending.popleft()
                hashed.result()
                written.result()
                progress(count)

        for block in _blocks(start, tensors):
            pending.append((hasher.submit(digest.update, block), writer.submit(_write, file, block), len(block)))
            settle(_PENDING)
            unflushed += len(block)
            if unflushed > _FLUSH_BYTES and flushed.done():  # the disk works while the rest is still being read
                unflushed, flushed = 0, flusher.submit(os.fdatasync, file.fileno())
        settle(0)
        flushed.result()
    return digest.hexdigest()


def _blocks(start: bytes, tensors: Mapping[str, TensorView]) -> Iterator[memoryview]:
    yield memoryview(start)
    for view in tensors.values():
        for index in slices(view.shape, view.dtype.itemsize, BLOCK_BYTES):
            data = contiguous(view.read(index)).reshape(-1).view(np.uint8)
            if data.size:
                yield data.data


def slices(shape: Sequence[int], itemsize: int, limit: int) -> Iterator[Index]:
    """Cuts an array into blocks of at most `limit` bytes (or one row of the last axis), in storage order."""
    size = itemsize
    for length in shape:
        size *= length
    if size <= limit or not shape:
        yield tuple(slice(0, length) for length in shape)
    elif size // shape[0] <= limit or len(shape) == 1:
        rows = max(1, limit * shape[0] // size)
        for first in range(0, shape[0], rows):
            yield (slice(first, min(first + rows, shape[0])), *(slice(0, length) for length in shape[1:]))
    else:
        for i in range(shape[0]):
            for rest in slices(shape[1:], itemsize, limit):
                yield (slice(i, i + 1), *rest)


def _write(file: Any, block: memoryview) -> None:
    while len(block):
        block = block[file.write(block[:_WRITE_BYTES]) :]


def _type(name: str, view: TensorView) -> str:
    if view.dtype not in DTYPE_NAMES:
        raise UserError(f"{name}: safetensors has no type for {view.dtype}")
    return DTYPE_NAMES[view.dtype]


def _shards(tensors: Mapping[str, TensorView], limit: int) -> list[dict[str, TensorView]]:
    shards: list[dict[str, TensorView]] = [{}]
    size = 0
    for name, view in tensors.items():
        if shards[-1] and size + view.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = view
        size += view.nbytes
    return shards


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` when the block ends well, and vanishes otherwise.

    Raises:
        UserError: `target` exists and is not an empty folder, or its parent does not exist.
    """
    target = Path(target)
    check_new_folder(target)
    temporary = target.absolute().parent / f".{target.absolute().name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # a stopped process of the same number left it
    temporary.mkdir()
    try:
        yield temporary
        fsync_directory(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(target.absolute().parent)


def check_new_folder(target: str | Path) -> None:
    """Raises `UserError` when `target` exists and is not an empty folder, or cannot be made."""
    target = Path(target)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UserError(f"{target}: exists already; give a new or empty folder")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.absolute().parent}: no such folder")
