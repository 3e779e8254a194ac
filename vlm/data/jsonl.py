"""JSON Lines: one object a line, with image files beside it or with text alone (parallel sentences)."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.annotations import nlvr2_record
from vlm.data.fields import FieldMap, parse_json
from vlm.data.image_files import ImageFiles
from vlm.data.shards import Starts, expand
from vlm.errors import UserError

_MAX_LINE = 64 << 20
_CHUNK = 16 << 20


class JsonlSource:
    """Random access to the lines of JSONL files.

    Args:
        path: files (see `shards.expand`).
        fields: see `fields.FieldMap`. Where `image` is a string (or a list of them) it names image files, which are
            read; without an image field the example is text only. Lines of NLVR2's own files name their pair of
            images by their identifier (see `annotations.nlvr2_record`).
        root: folder that image paths are relative to; None means each JSONL file's own folder (see `ImageFiles`).
        name: how the source is called in messages and in the skip ledger.
        num_shards: number of files there must be.
        max_bytes: largest image file that is read.
        frames: number of frames that are read of a video, a folder of pictures (see `ImageFiles`).

    Raises:
        UserError: at construction for a missing, empty or compressed file, or one whose first or last line is not
            a JSON object (a file that was cut short).
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        fields: Mapping[str, str] | None = None,
        root: str | None = None,
        name: str = "",
        num_shards: int | None = None,
        max_bytes: int = 64 << 20,
        frames: int | None = None,
    ):
        self.shards = expand(path, num_shards=num_shards)
        self.name = name or f"jsonl:{path if isinstance(path, str) else path[0]}"
        self._fields = FieldMap.parse(fields)
        self._images = [ImageFiles(root, os.path.dirname(shard), max_bytes, frames) for shard in self.shards]
        self._lines = [index_lines(shard) for shard in self.shards]
        self._starts = Starts([len(lines) for lines in self._lines])
        digest = hashlib.sha256(repr(self._fields).encode())
        for number, shard in enumerate(self.shards):
            size = os.path.getsize(shard)
            digest.update(f"{os.path.basename(shard)} {size} {len(self._lines[number])}\n".encode())
            for line in (0, len(self._lines[number]) - 1):
                try:
                    self._record(number, line)
                except UserError as error:
                    what = "truncated" if line else "wrong format"
                    raise UserError(f"{error} ({what}? one JSON object a line is expected)") from None
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for a garbled line or an image file that cannot be read."""
        shard, line = self._starts.locate(index)
        where = f"{self.shards[shard]}: line {self._lines[shard][line, 2]}"
        record = nlvr2_record(self._record(shard, line))
        key = str(record.get("key", f"{os.path.basename(self.shards[shard])}:{self._lines[shard][line, 2]}"))
        example = self._fields.apply(record, key, where)
        if "image" in example:
            example["image"] = self._images[shard].read(example["image"], where)
        return example

    def _record(self, shard: int, line: int) -> dict[str, Any]:
        start, stop, number = map(int, self._lines[shard][line])
        where = f"{self.shards[shard]}: line {number}"
        if stop - start > _MAX_LINE:
            raise UserError(f"{where}: {stop - start:,} bytes long (limit {_MAX_LINE:,})")
        with open(self.shards[shard], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
        record = parse_json(data.removeprefix(b"\xef\xbb\xbf"), where)
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
        return record


def index_lines(path: str) -> np.ndarray:
    """Returns int64[lines, 3] of (start, stop, line number from 1) for every line that is not blank."""
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path}: gzip-compressed; random access needs the plain file, so decompress it first")
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            ends = [
                start + np.flatnonzero(np.frombuffer(view[start : start + _CHUNK], np.uint8) == ord("\n"))
                for start in range(0, size, _CHUNK)
            ]
    stops = np.concatenate([*ends, [size]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    lines = np.stack([starts, stops, np.arange(1, len(stops) + 1)], axis=1)
    lines = lines[lines[:, 1] > lines[:, 0]]
    with open(path, "rb", buffering=0) as file:
        short = np.flatnonzero(lines[:, 1] - lines[:, 0] <= 4)
        blank = [
            i for i in short if not os.pread(file.fileno(), int(lines[i, 1] - lines[i, 0]), int(lines[i, 0])).strip()
        ]
    lines = np.delete(lines, blank, axis=0)
    if not len(lines):
        raise UserError(f"{path}: empty shard (only blank lines)")
    return lines
