"""Examples in tar shards as webdataset and img2dataset write them, by random access, without unpacking."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.data.fields import FieldMap, parse_json
from vlm.data.shards import Starts, expand
from vlm.data.tar_index import read_index
from vlm.errors import UserError

_MAX_OPEN = 256
_MAX_BYTES = 64 << 20
_TEXT = ("txt", "text", "caption", "transcript")


class TarSource:
    """Random access to the examples of plain tar shards.

    Args:
        path: shards (see `shards.expand`).
        fields: see `fields.FieldMap`; a field is the member name after the first dot, lower case (`jpg`,
            `json/caption`). `.txt`, `.caption` become str, `.cls` int, `.json` its value; others stay bytes.
        name: how the source is called in messages and in the skip ledger.
        num_shards: number of shards there must be.
        index_dir: folder where shard indices are kept between runs; None builds them anew each time.
        max_bytes: largest member that is read; larger ones make their example unreadable.

    Raises:
        UserError: at construction for any missing, empty, truncated, compressed or garbled shard.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        fields: Mapping[str, str] | None = None,
        name: str = "",
        num_shards: int | None = None,
        index_dir: str | None = None,
        max_bytes: int = _MAX_BYTES,
    ):
        shards = expand(path, num_shards=num_shards)
        self._open(shards, fields, name or f"tar:{path if isinstance(path, str) else path[0]}", index_dir, max_bytes)

    @classmethod
    def single(cls, shard: str, *, fields: Mapping[str, str] | None = None, name: str = "") -> TarSource:
        """One shard on its own, also where its name says that there are others."""
        source = cls.__new__(cls)
        source._open([shard], fields, name or f"tar:{shard}", None, _MAX_BYTES)
        return source

    def _open(
        self, shards: list[str], fields: Mapping[str, str] | None, name: str, index_dir: str | None, max_bytes: int
    ) -> None:
        self.shards, self.name, self.max_bytes = shards, name, max_bytes
        self._fields = FieldMap.parse(fields)
        with concurrent.futures.ThreadPoolExecutor(min(16, len(self.shards))) as pool:
            self._indices = list(pool.map(lambda shard: read_index(shard, index_dir), self.shards))
        self._starts = Starts([len(index) for index in self._indices])
        self._files = _OpenFiles(self.shards)
        digest = hashlib.sha256(repr(self._fields).encode())
        for shard, index in zip(self.shards, self._indices, strict=True):
            digest.update(f"{os.path.basename(shard)} {os.path.getsize(shard)} {len(index)}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError when its bytes cannot be read as promised by the index."""
        shard, example = self._starts.locate(index)
        tar = self._indices[shard]
        key = tar.key(example)
        where = f"{self.shards[shard]}: example {key!r}"
        record: dict[str, Any] = {}
        for field, offset, size in tar.members(example):
            if not self._fields.reads(field):
                record.setdefault(field, None)
                continue
            if size > self.max_bytes:
                raise UserError(f"{where}: member .{field} has {size:,} bytes (limit {self.max_bytes:,})")
            record[field] = _value(field, self._files.read(shard, offset, size, where), where)
        return self._fields.apply(record, key, where)


def _value(field: str, data: bytes, where: str) -> Any:
    kind = field.rsplit(".", 1)[-1]
    if kind in _TEXT:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: .{field} is not UTF-8 ({error.reason} at byte {error.start})") from None
    if kind == "json":
        return parse_json(data, f"{where}: .{field}")
    if kind == "cls":
        try:
            return int(data)
        except ValueError:
            raise UserError(f"{where}: .{field} is not an integer: {data[:40]!r}") from None
    return data


class _Descriptor:
    """A file descriptor that closes when its last user lets go, also in the middle of another thread's eviction."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """Reads ranges of many files from many threads, with at most `_MAX_OPEN` of them open."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self.__setstate__({"_paths": paths})

    def __getstate__(self) -> dict:
        return {"_paths": self._paths}

    def __setstate__(self, state: dict) -> None:
        self._paths = state["_paths"]
        self._open: collections.OrderedDict[int, _Descriptor] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: int, offset: int, size: int, where: str) -> bytes:
        with self._lock:
            descriptor = self._open.get(file)
            if descriptor is None:
                descriptor = self._open[file] = _Descriptor(self._paths[file])
                if len(self._open) > _MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(file)
        parts = []
        while size > 0:
            part = os.pread(descriptor.number, size, offset)
            if not part:
                raise UserError(f"{where}: the shard became shorter while it was read")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)
