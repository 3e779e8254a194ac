"""Parquet files (img2dataset, interleaved documents, exported datasets) by random access.

Parquet is read a row group at a time, so a few recent row groups are kept in memory. Shuffled reading is fast where
those fit (`cache_bytes`) or row groups are small; write row groups of about a hundred examples.
"""

from __future__ import annotations

import collections
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.fields import FieldMap
from vlm.data.image_files import ImageFiles
from vlm.data.shards import Starts, expand
from vlm.errors import UserError, did_you_mean


class ParquetSource:
    """Random access to the rows of parquet files.

    Args:
        path: files (see `shards.expand`); all must have the same columns.
        fields: see `fields.FieldMap`. `image` may be a column of bytes, of {bytes, path} as the `datasets` library
            writes, of paths, or a list of any of these.
        where: column -> value; only rows equal in all of them are used. Default: rows with status "success" where
            the file is img2dataset's (columns url, key and status), else all.
        root: folder of image paths (see `ImageFiles`).
        name: how the source is called in messages and in the skip ledger.
        num_shards: number of files there must be.
        cache_bytes: memory for recently used row groups.
        max_bytes: largest image that is read.

    Raises:
        UserError: at construction for a missing, empty, truncated or foreign file, or one with other columns.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        fields: Mapping[str, str] | None = None,
        where: Mapping[str, Any] | None = None,
        root: str | None = None,
        name: str = "",
        num_shards: int | None = None,
        cache_bytes: int = 512 << 20,
        max_bytes: int = 64 << 20,
    ):
        self.shards = expand(path, num_shards=num_shards)
        self.name = name or f"parquet:{path if isinstance(path, str) else path[0]}"
        self._fields = FieldMap.parse(fields)
        self._max_bytes = max_bytes
        self._images = [ImageFiles(root, os.path.dirname(shard), max_bytes) for shard in self.shards]
        self._groups, self._rows, self._columns = [], [], None
        digest = hashlib.sha256(f"{self._fields} {where}".encode())
        for shard in self.shards:
            starts, rows = self._open(shard, where)
            self._groups.append(starts)
            self._rows.append(rows)
            digest.update(f"{os.path.basename(shard)} {os.path.getsize(shard)} {len(rows)}\n".encode())
        self._starts = Starts([len(rows) for rows in self._rows])
        self._cache = _RowGroups(self.shards, self._columns, cache_bytes)
        self.fingerprint = digest.hexdigest()

    def _open(self, shard: str, where: Mapping[str, Any] | None) -> tuple[Starts, np.ndarray]:
        """Checks one file; returns its row groups and the numbers of the rows used."""
        with _reading(shard) as file:
            names = file.schema_arrow.names
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            if where is None:
                where = {"status": "success"} if {"url", "key", "status"} <= set(names) else {}
            for column in where:
                if column not in names:
                    raise UserError(f"{shard}: where: no column {column!r}{did_you_mean(column, names)}")
            keep = np.ones(sum(lengths), bool)
            for column, value in where.items():
                keep &= np.array([item == value for item in file.read([column]).column(0).to_pylist()], bool)
        rows = np.flatnonzero(keep)
        if not len(rows):
            raise UserError(
                f"{shard}: empty shard ({len(keep)} rows, none with {dict(where)})"
                if len(keep)
                else f"{shard}: empty shard (0 rows)"
            )
        columns = [column for column in names if self._fields.reads(column)]
        if self._columns is None:
            self._columns, self._names = columns, names
        elif columns != self._columns:
            raise UserError(f"{shard}: columns {', '.join(names)} differ from {', '.join(self._names)} before")
        return Starts(lengths), rows

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for a damaged row group or an image that cannot be read."""
        shard, position = self._starts.locate(index)
        row = int(self._rows[shard][position])
        where = f"{self.shards[shard]}: row {row}"
        group, inside = self._groups[shard].locate(row)
        table = self._cache.get(shard, group)
        record = {name: table.column(name)[inside].as_py() for name in table.column_names}
        key = str(record.get("key") or f"{os.path.basename(self.shards[shard])}:{row}")
        example = self._fields.apply({**dict.fromkeys(self._names), **record}, key, where)
        if example.get("image") is not None:
            example["image"] = self._image(example["image"], shard, where)
        return example

    def _image(self, value: Any, shard: int, where: str) -> Any:
        if isinstance(value, list):
            return [self._image(item, shard, where) for item in value]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and len(value) > self._max_bytes:
            raise UserError(f"{where}: image has {len(value):,} bytes (limit {self._max_bytes:,})")
        return self._images[shard].read(value, where)


class _RowGroups:
    """Row groups most recently read, up to a number of bytes; several threads wanting one read it once."""

    def __init__(self, paths: Sequence[str], columns: Sequence[str] | None, limit: int):
        self.__setstate__((paths, columns, limit))

    def __getstate__(self) -> tuple:
        return self._paths, self._columns, self._limit

    def __setstate__(self, state: tuple) -> None:
        self._paths, self._columns, self._limit = state
        self._tables: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._reading: dict[tuple[int, int], threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, shard: int, group: int) -> Any:
        with self._lock:
            if (shard, group) in self._tables:
                self._tables.move_to_end((shard, group))
                return self._tables[shard, group]
            turn = self._reading.setdefault((shard, group), threading.Lock())
        with turn:
            with self._lock:
                if (shard, group) in self._tables:
                    return self._tables[shard, group]
            with _reading(self._paths[shard]) as file:
                table = file.read_row_group(group, columns=self._columns, use_threads=False)
            with self._lock:
                self._tables[shard, group] = table
                self._reading.pop((shard, group), None)
                while len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > self._limit:
                    self._tables.popitem(last=False)
            return table


class _reading:  # noqa: N801 - reads as a verb in `with _reading(path) as file`
    """Opens a parquet file with page checksums verified; what pyarrow raises becomes one line."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            self._file = pyarrow.parquet.ParquetFile(self._path, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self._path}: not a readable parquet file ({_line(error)})") from None
        return self._file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow

        self._file.close()
        # pyarrow reports damage as OSError too, then without an errno; a failing disk has one and stays itself.
        damaged = isinstance(error, pyarrow.ArrowException)
        if error is not None and (damaged or (isinstance(error, OSError) and error.errno is None)):
            raise UserError(f"{self._path}: damaged row group ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
