"""JSON documents with image files beside them: lists of records, and the published forms of COCO, VQA and Karpathy.

A list's records are found once, when the source is opened, and read from the file when asked for; only where
they stand is kept. The other forms are joined to records (see `annotations.py`) and kept as compact JSON.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.annotations import published_records
from vlm.data.fields import FieldMap, parse_json
from vlm.data.image_files import ImageFiles
from vlm.data.json_scan import Element, read_document, scan
from vlm.data.shards import Starts, expand
from vlm.errors import UserError

_START, _STOP, _NUMBER, _PART, _IDENTITY = range(5)
_OTHER_NAMES = {"images": "image", "sentence": "text"}  # as in NLVR2's lists


class JsonSource:
    """Random access to the records of JSON files.

    Args:
        path: files (see `shards.expand`), each a list of objects or of a form that `annotations.py` knows.
        fields: see `fields.FieldMap`. `image` names an image file, or several as a list; one file's name as the record
            has it is kept as `image_file`.
        where: field -> value, or a tuple of values; only such records are used: {"split": ("train", "restval")}.
        each: a field that holds a list; every element makes an example of its own: "caption".
        number: a field by whose values, in order of first appearance over all files, examples get a consecutive
            `image_number`: "image_id".
        annotations: file of answers that belongs to a file of VQA questions.
        root: folder that image paths are relative to; None means each file's own folder (see `ImageFiles`).
        name: how the source is called in messages and in the skip ledger.
        num_shards: number of files there must be.
        max_bytes: largest image file that is read.
        frames: number of frames that are read of a video, a folder of pictures (see `ImageFiles`).

    Raises:
        UserError: at construction for a missing or truncated file, another form, or no record to use.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        fields: Mapping[str, str] | None = None,
        where: Mapping[str, Any] | None = None,
        each: str | None = None,
        number: str | None = None,
        annotations: str | None = None,
        root: str | None = None,
        name: str = "",
        num_shards: int | None = None,
        max_bytes: int = 64 << 20,
        frames: int | None = None,
    ):
        self.shards = expand(path, num_shards=num_shards)
        self.name = name or f"json:{path if isinstance(path, str) else path[0]}"
        self._fields = FieldMap.parse(fields)
        self._where, self._each, self._number = dict(where or {}), each, number
        self._images = [ImageFiles(root, os.path.dirname(shard), max_bytes, frames) for shard in self.shards]
        if annotations is not None:
            annotations = expand(annotations, num_shards=1)[0]
        identities: dict[Any, int] = {}
        loaded = [self._load(shard, annotations, identities) for shard in self.shards]
        self._rows, self._joined = [rows for rows, _ in loaded], [joined for _, joined in loaded]
        self._starts = Starts([len(rows) for rows in self._rows])
        digest = hashlib.sha256(repr((self._fields, self._where, each, number)).encode())
        for shard, rows in zip(self.shards, self._rows, strict=True):
            digest.update(f"{os.path.basename(shard)} {os.path.getsize(shard)} {len(rows)}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for a record that lacks a field, or an image that cannot be read."""
        shard, row = self._starts.locate(index)
        start, stop, number, part, identity = self._rows[shard][row].tolist()
        path = self.shards[shard]
        where = f"{path}: record {number}"
        record = parse_json(self._read(shard, start, stop), where)
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
        key = str(record.get("key", f"{os.path.basename(path)}:{number}" + (f".{part}" if part >= 0 else "")))
        if part >= 0:
            record[str(self._each)] = record[str(self._each)][part]
        for other, ours in _OTHER_NAMES.items():
            if other in record:
                record.setdefault(ours, record[other])
        example = self._fields.apply(record, key, where)
        if identity >= 0:
            example["image_number"] = identity
        if "image" in example:
            if isinstance(example["image"], str):
                example.setdefault("image_file", example["image"])
            example["image"] = self._images[shard].read(example["image"], where)
        return example

    def _read(self, shard: int, start: int, stop: int) -> bytes:
        joined = self._joined[shard]
        if joined is not None:
            return joined[start:stop]
        with open(self.shards[shard], "rb", buffering=0) as file:
            return os.pread(file.fileno(), stop - start, start)

    def _load(self, path: str, annotations: str | None, identities: dict[Any, int]) -> tuple[np.ndarray, bytes | None]:
        """Returns int64[rows, 5] (columns as above), and the joined records where the file's own do not serve."""
        data = read_document(path)
        elements = scan(data, path)
        first = next(elements, None)
        if first is None:
            raise UserError(f"{path}: empty shard (no records)")
        elements, joined = itertools.chain([first], elements), None
        if first.section:
            elements, joined = _join(published_records(elements, path, annotations))
        elif annotations is not None:
            raise UserError(f"{path}: `annotations` belong to a file of VQA questions, found a list of records")
        elif not isinstance(first.value, dict):
            raise UserError(f"{path}: record 1: expected a JSON object, found {type(first.value).__name__}")
        rows = array.array("q")
        count = 0
        for element in elements:
            count += 1
            if self._chosen(element.value, f"{path}: record {element.number}"):
                rows.extend(self._places(element, path, identities))
        if not rows:
            raise UserError(f"{path}: empty shard ({count} records, none with {self._where or self._each})")
        return np.frombuffer(rows, np.int64).reshape(-1, 5), joined

    def _chosen(self, record: Any, where: str) -> bool:
        for field, wanted in self._where.items():
            if not isinstance(record, dict) or field not in record:
                raise UserError(f"{where}: where: no field {field!r}")
            if record[field] not in (wanted if isinstance(wanted, (list, tuple)) else (wanted,)):
                return False
        return True

    def _places(self, element: Element, path: str, identities: dict[Any, int]) -> Iterator[int]:
        record, parts, identity = element.value, range(-1, 0), -1
        where = f"{path}: record {element.number}"
        if self._each is not None:
            several = record.get(self._each) if isinstance(record, dict) else None
            if not isinstance(several, list):
                raise UserError(f"{where}: each: field {self._each!r} must be a list, found {several!r:.80}")
            parts = range(len(several))
        if self._number is not None:
            value = record.get(self._number) if isinstance(record, dict) else None
            if not isinstance(value, (str, int)):
                raise UserError(
                    f"{where}: number: field {self._number!r} must be a name or number, found {value!r:.80}"
                )
            identity = identities.setdefault(value, len(identities))
        for part in parts:
            yield from (element.start, element.stop, element.number, part, identity)


def _join(records: Iterator[dict[str, Any]]) -> tuple[Iterator[Element], bytes]:
    encoded, elements, start = [], [], 0
    for number, record in enumerate(records, 1):
        data = json.dumps(record, separators=(",", ":")).encode()
        encoded.append(data)
        elements.append(Element("", number, start, start + len(data), None))
        start += len(data)
    joined = b"".join(encoded)
    return (element._replace(value=json.loads(joined[element.start : element.stop])) for element in elements), joined
