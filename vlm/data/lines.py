"""Plain lists of lines, as the retrieval sets of other languages are published: XTD10, Multi30K, COCO-CN, Flickr30k-CN.

Either one file names the images, a line each, and in files of texts the same line belongs to the same image (XTD10,
Multi30K); or every line holds a name and one of its captions, in one of two forms:

    COCO_val2014_000000123456#zhm#0 caption     name, `#` tags, then a tab or spaces (COCO-CN, Flickr30k's token files)
    1007129816.jpg,caption                      name, comma; a first line `image,caption` is a header (Flickr30k-CN)

The lists are small: they are read once, when the source is opened, and kept.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.data.fields import FieldMap
from vlm.data.image_files import ImageFiles
from vlm.data.jsonl import index_lines
from vlm.data.shards import expand
from vlm.errors import UserError

_MAX_BYTES = 256 << 20
_CAPTION = re.compile(r"(?:([^#\s,]+)(?:#\w+)+\s+|([^#\s,]+\.(?:jpe?g|png)),)\s*(\S.*)", re.IGNORECASE | re.DOTALL)
_HEADER = "image,caption"
_NAME = "{name}"


class LinesSource:
    """Random access to images with the texts that lists of lines give them.

    An example's `key` and `name` are the image's name as the list has it. Its texts are a list in the field `text`, or,
    with `texts`, in the fields that it names: a string each, or a list where it names several files.

    Args:
        path: files (see `shards.expand`) of names with captions; with `texts`, one file of names alone.
        texts: field -> files, each with as many lines as `path`, in the same order:
            {"en": "test_1kcaptions_en.txt", "de": "test_2016.{1..5}.de"}.
        ids: a file of names, a line each: only these images are used, in this order. None: all, in order of their
            first appearance.
        image: where the image of a name lies; alternatives are separated by `;`, the first that can be read wins:
            "train2014/{name}.jpg;val2014/{name}.jpg".
        fields: see `fields.FieldMap`; without `image` among them, no image is read.
        root: folder that image paths are relative to; None means the folder of the first file (see `ImageFiles`).
        name: how the source is called in messages and in the skip ledger.
        num_shards: number of files there must be in `path`.
        max_bytes: largest image file that is read.

    Raises:
        UserError: at construction for a missing, empty, compressed or very large file, one that is not UTF-8, files of
            different numbers of lines, a name that is listed twice, a line without a name and a caption, or an id
            without captions.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        *,
        texts: Mapping[str, str | Sequence[str]] | None = None,
        ids: str | None = None,
        image: str = _NAME,
        fields: Mapping[str, str] | None = None,
        root: str | None = None,
        name: str = "",
        num_shards: int | None = None,
        max_bytes: int = 64 << 20,
    ):
        self.shards = expand(path, num_shards=num_shards)
        self.name = name or f"lines:{path if isinstance(path, str) else path[0]}"
        self._fields = FieldMap.parse(fields)
        self._places = [place.strip() for place in image.split(";")]
        for place in self._places:
            if _NAME not in place:
                raise UserError(f"image: expected paths with {_NAME}, such as 'val2014/{_NAME}.jpg', found {image!r}")
        self._images = ImageFiles(root, os.path.dirname(self.shards[0]), max_bytes)
        records = _captions(self.shards) if texts is None else _aligned(self.shards, texts)
        if ids is not None:
            records = _chosen(records, expand(ids, num_shards=1)[0], self.name)
        self._records = list(records.items())
        self.fingerprint = hashlib.sha256(repr((self._fields, self._places, self._records)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for a field that is absent or an image that cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        name, texts = self._records[index]
        where = f"{self.shards[0]}: {name}"
        example = self._fields.apply({"name": name, "image": name, **texts}, name, where)
        if "image" in example:
            example["image"] = self._read(str(example["image"]), where)
        return example

    def _read(self, name: str, where: str) -> bytes:
        problems = []
        for place in self._places:
            try:
                return self._images.read(place.replace(_NAME, name), where)
            except UserError as error:
                problems.append(str(error).removeprefix(f"{where}: "))
        raise UserError(f"{where}: {'; '.join(problems)}")


def _captions(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> its captions, of lines that hold both."""
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        for number, line in _lines(path):
            if number == 1 and line == _HEADER:
                continue
            match = _CAPTION.fullmatch(line)
            if not match:
                raise UserError(
                    f"{path}: line {number}: expected 'name#0 caption' or 'name.jpg,caption', found {line!r:.80} "
                    "(names alone need `texts`)"
                )
            records.setdefault(match[1] or match[2], {"text": []})["text"].append(match[3])
    if not records:
        raise UserError(f"{paths[0]}: no caption (only a header)")
    return records


def _aligned(paths: Sequence[str], texts: Mapping[str, str | Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Name -> its texts by field, of files whose lines belong together by number."""
    if len(paths) > 1:
        raise UserError(f"with `texts`, `path` is one file of names, found {len(paths)}: {paths[0]}, {paths[1]}, …")
    if not texts or {"key", "name", "image"} & set(texts):
        raise UserError(f"texts: expected fields other than key, name and image, found {', '.join(texts) or 'none'}")
    for field, path in texts.items():
        if not isinstance(path, (str, tuple, list)) or not all(isinstance(each, str) for each in path):
            raise UserError(f"texts: expected a file or files for {field!r}, found {path!r:.80}")
    names = _whole(paths[0])
    records: dict[str, dict[str, Any]] = {name: {} for name in _different(names, paths[0])}
    for field, path in texts.items():
        files = expand(path)
        columns = [_whole(file) for file in files]
        for file, column in zip(files, columns, strict=True):
            if len(column) != len(names):
                raise UserError(f"{file}: expected {len(names)} lines as in {paths[0]}, found {len(column)}")
        for record, *values in zip(records.values(), *columns, strict=True):
            record[field] = values[0] if len(files) == 1 else values
    return records


def _chosen(records: Mapping[str, Any], path: str, name: str) -> dict[str, Any]:
    """The records that a file of names lists, in its order."""
    ids = _different(_whole(path), path)
    absent = [each for each in ids if each not in records]
    if absent:
        raise UserError(f"{path}: {len(absent)} of {len(ids)} names are not in {name}, the first is {absent[0]!r:.80}")
    return {each: records[each] for each in ids}


def _different(names: list[str], path: str) -> list[str]:
    if len(set(names)) < len(names):
        again = next(number for number, each in enumerate(names, 1) if each in names[: number - 1])
        raise UserError(f"{path}: line {again}: {names[again - 1]!r:.80} is listed twice")
    return names


def _whole(path: str) -> list[str]:
    """All lines of a file that may have blank ones at its end only: they would shift what belongs together."""
    numbered = _lines(path)
    for place, (number, _) in enumerate(numbered, 1):
        if number != place:
            raise UserError(f"{path}: line {place}: expected text, found a blank line")
    return [line for _, line in numbered]


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines that are not blank, numbered from 1, without white space around them."""
    if os.path.getsize(path) > _MAX_BYTES:
        raise UserError(f"{path}: {os.path.getsize(path):,} bytes (limit {_MAX_BYTES:,}; make it a jsonl source)")
    places = index_lines(path)
    with open(path, "rb") as file:
        data = file.read()
    numbered = []
    for start, stop, number in places.tolist():
        try:
            line = data[start:stop].decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            where = f"{path}: line {number}"
            raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if line:
            numbered.append((number, line))
    return numbered
