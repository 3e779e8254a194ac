"""Tab-separated text, a record a line, as GLUE's data sets are published: no quoting, with or without a header."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.fields import FieldMap
from vlm.data.image_files import ImageFiles
from vlm.data.jsonl import index_lines
from vlm.data.shards import Starts, expand
from vlm.errors import UserError

_CHUNK = 16 << 20
_MAX_LINE = 1 << 20


class TsvSource:
    """Random access to the lines of tab-separated files.

    Quotation marks are characters like any other, a byte order mark and carriage returns at the ends are dropped.

    Args:
        path: files (see `shards.expand`).
        columns: names of the columns of files without a header, as CoLA's; None: the first line names them.
        fields: see `fields.FieldMap`; every value is a string. `image` names an image file.
        max_broken: number of lines, over all files, that may have another number of columns and are left out. QQP has
            some. A file whose last line is broken was cut short.
        root: folder that image paths are relative to; None means each file's own folder (see `ImageFiles`).
        name: how the source is called in messages and in the skip ledger.
        num_shards: number of files there must be.
        max_bytes: largest image file that is read.

    Raises:
        UserError: at construction for a missing, empty, compressed or cut file, one without a line for each column
            name, or with too many broken lines.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        columns: Sequence[str] | None = None,
        fields: Mapping[str, str] | None = None,
        max_broken: int = 0,
        root: str | None = None,
        name: str = "",
        num_shards: int | None = None,
        max_bytes: int = 64 << 20,
    ):
        self.shards = expand(path, num_shards=num_shards)
        self.name = name or f"tsv:{path if isinstance(path, str) else path[0]}"
        self._fields = FieldMap.parse(fields)
        self._images = [ImageFiles(root, os.path.dirname(shard), max_bytes) for shard in self.shards]
        self._columns: list[list[str]] = []
        self._lines: list[np.ndarray] = []
        broken: list[str] = []
        for shard in self.shards:
            lines = index_lines(shard)
            names = list(columns) if columns is not None else _read(shard, lines[0])
            if len(set(names)) < len(names):
                raise UserError(f"{shard}: line 1: expected different column names, found {', '.join(names)}"[:300])
            lines = lines if columns is not None else lines[1:]
            whole = _tabs(shard, lines) == len(names) - 1
            if not whole.any():
                raise UserError(f"{shard}: no line has the {len(names)} columns {', '.join(names)}"[:300])
            if not whole[-1]:
                raise UserError(f"{shard}: line {lines[-1, 2]}: expected {len(names)} columns (truncated?)")
            broken += [f"{shard}: line {number}" for number in lines[~whole, 2]]
            self._columns.append(names)
            self._lines.append(lines[whole])
        if len(broken) > max_broken:
            allowed = f"; up to max_broken={max_broken} may" if max_broken else ""
            raise UserError(f"{broken[0]}: another number of columns than the header ({len(broken)} lines{allowed})")
        self._starts = Starts([len(lines) for lines in self._lines])
        digest = hashlib.sha256(repr((self._fields, columns)).encode())
        for shard, lines in zip(self.shards, self._lines, strict=True):
            digest.update(f"{os.path.basename(shard)} {os.path.getsize(shard)} {len(lines)}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for a line that is not UTF-8 or an image file that cannot be read."""
        shard, row = self._starts.locate(index)
        path, line = self.shards[shard], self._lines[shard][row]
        where = f"{path}: line {line[2]}"
        record: dict[str, Any] = dict(zip(self._columns[shard], _read(path, line), strict=True))
        key = record.get("key", f"{os.path.basename(path)}:{line[2]}")
        example = self._fields.apply(record, key, where)
        if "image" in example:
            example["image"] = self._images[shard].read(example["image"], where)
        return example


def _read(path: str, line: np.ndarray) -> list[str]:
    """The cells of one line, given as (start, stop, number)."""
    start, stop, number = map(int, line)
    if stop - start > _MAX_LINE:
        raise UserError(f"{path}: line {number}: {stop - start:,} bytes long (limit {_MAX_LINE:,})")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), stop - start, start)
    try:
        return data.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\r").decode().split("\t")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _tabs(path: str, lines: np.ndarray) -> np.ndarray:
    """Number of tabs in each line."""
    places = []
    with open(path, "rb") as file:
        for start in range(0, os.path.getsize(path), _CHUNK):
            places.append(start + np.flatnonzero(np.frombuffer(file.read(_CHUNK), np.uint8) == ord("\t")))
    tabs = np.concatenate(places)
    return np.searchsorted(tabs, lines[:, 1]) - np.searchsorted(tabs, lines[:, 0])
