"""Prepared TFDS folders, read without TensorFlow.

Only the stored bytes are used: images come back encoded, exactly as they were put in. TFDS itself would decode
images with whatever decoder is installed, cannot skip that inside sequences, returns text as bytes, ignores
sub-splits of parquet files, and reports no error for array_record files that were cut short; hence this reader
takes from TFDS the split arithmetic and the record parser, and does the rest.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm.data.fields import FieldMap
from vlm.errors import UserError, did_you_mean

_READABLE = ("array_record", "parquet")


class TfdsSource:
    """Random access to one split of a prepared TFDS folder (the one that holds `dataset_info.json`).

    Args:
        path: the folder; a folder with exactly one version (or config/version) below it is taken too.
        split: `train`, `train[:50%]`, `train[10:20]+test`, ... (sub-splits only of array_record files).
        fields: see `fields.FieldMap`; nested features as `captions/text`.
        name: how the source is called in messages and in the skip ledger.

    Raises:
        UserError: no such split, unreadable file format, or a shard that is missing, cut short, or holds another
            number of records than `dataset_info.json` says.
    """

    def __init__(self, path: str, split: str = "train", *, fields: Mapping[str, str] | None = None, name: str = ""):
        self.folder = _find_folder(os.path.expanduser(path))
        self.split = split
        self.name = name or f"tfds:{path}:{split}"
        self._fields = FieldMap.parse(fields)
        builder = _open_builder(self.folder)
        _check_split(builder, self.folder, split)
        lengths = _check_shards(builder, split)
        self._open(builder)
        info = builder.info
        identity = (info.name, str(info.version), split, lengths, self._fields)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    def _open(self, builder: Any) -> None:
        from tensorflow_datasets.core import decode, example_parser

        self._records = builder.as_data_source(self.split, deserialize_method=decode.DeserializeMethod.RAW_BYTES)
        self._length = len(self._records)
        self._convert = _converter(builder.info.features)
        stored = builder.info.features.get_serialized_info()
        self._parser = example_parser.ExampleParserNp(self._fields.needed(stored))

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_records", "_convert", "_parser")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open(_open_builder(self.folder))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError when the stored record is damaged."""
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        where = f"{self.folder} {self.split} record {index}"
        try:
            example = self._parser.parse_example(bytes(self._records[index]))
        except OSError:
            raise
        except Exception as error:  # the C++ reader and the parser raise many types, all meaning damage
            raise UserError(f"{where}: damaged record ({' '.join(str(error).split())[:200]})") from None
        return self._fields.apply(self._convert(example), f"{self.split}:{index}", where)


def _find_folder(path: str) -> str:
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder (expected a prepared TFDS dataset)")
    found = [path] if os.path.exists(os.path.join(path, "dataset_info.json")) else []
    depth = [path]
    while not found and len(depth) == 1 and depth[0].count(os.sep) - path.count(os.sep) < 3:
        depth = [entry.path for entry in os.scandir(depth[0]) if entry.is_dir() and entry.name != "downloads"]
        found = [folder for folder in depth if os.path.exists(os.path.join(folder, "dataset_info.json"))]
    if len(found) != 1:
        what = f"several versions ({', '.join(sorted(found))}); give one" if found else "no dataset_info.json"
        raise UserError(f"{path}: {what}")
    return found[0]


def _open_builder(folder: str) -> Any:
    from absl import logging

    try:
        with open(os.path.join(folder, "dataset_info.json"), encoding="utf-8") as file:
            info = json.load(file)
        with open(os.path.join(folder, "features.json"), encoding="utf-8") as file:
            features = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot read the dataset's description ({error})") from None
    file_format = info.get("fileFormat", "tfrecord") if isinstance(info, dict) else "unknown"
    if file_format not in _READABLE:
        raise UserError(
            f"{folder}: file format {file_format!r} needs TensorFlow; prepare it as array_record "
            f"(tfds build --file_format=array_record)"
        )
    # TFDS imports the class each feature names, so only its own are let through.
    foreign = [c for c in re.findall(r'"pythonClassName":\s*"([^"]*)"', features) if not _is_tfds_class(c)]
    if foreign:
        raise UserError(f"{folder}: feature of unknown class {foreign[0]!r} in features.json")
    import tensorflow_datasets as tfds

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise UserError(f"{folder}: not a readable TFDS dataset ({' '.join(str(error).split())[:200]})") from None
    finally:
        logging.set_verbosity(level)


def _is_tfds_class(name: str) -> bool:
    return re.fullmatch(r"tensorflow_datasets\.core\.features\.[\w.]+", name) is not None


def _check_split(builder: Any, folder: str, split: str) -> None:
    names = list(builder.info.splits)
    for part in re.split(r"\+", split):
        base = part.split("[")[0].strip()
        if base not in names and base != "all":
            raise UserError(f"{folder}: no split {base!r}{did_you_mean(base, names)}")
    if str(builder.info.file_format.value) == "parquet" and split not in names:
        raise UserError(
            f"{folder}: split {split!r} of parquet files: sub-splits are ignored by the reader (it would return all "
            f"records); prepare the dataset as array_record or use a whole split"
        )
    try:
        count = builder.info.splits[split].num_examples
    except Exception as error:
        raise UserError(f"{folder}: cannot read split {split!r} ({' '.join(str(error).split())[:200]})") from None
    if count == 0:
        raise UserError(f"{folder}: split {split!r} is empty")


def _check_shards(builder: Any, split: str) -> list[int]:
    """Compares every shard of the splits used with `shardLengths`; returns the lengths."""
    used = [name for name in builder.info.splits if re.search(rf"(^|\+)\s*({re.escape(name)}|all)\s*(\[|\+|$)", split)]
    shards = [
        (os.fspath(path), int(length))
        for name in used
        for path, length in zip(
            builder.info.splits[name].filepaths, builder.info.splits[name].shard_lengths, strict=True
        )
    ]
    count = _count_parquet if str(builder.info.file_format.value) == "parquet" else _count_array_record
    with concurrent.futures.ThreadPoolExecutor(min(16, len(shards))) as pool:
        actual = list(pool.map(lambda shard: _count(count, shard[0]), shards))
    for (path, expected), found in zip(shards, actual, strict=True):
        if found != expected:
            raise UserError(f"{path}: truncated or garbled shard: expected {expected} records, found {found}")
    return [length for _, length in shards]


def _count(count: Callable[[str], int], path: str) -> int:
    if not os.path.exists(path):
        raise UserError(f"missing shard: {path}")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: empty shard (0 bytes)")
    try:
        return count(path)
    except Exception as error:
        raise UserError(f"{path}: cannot open the shard ({' '.join(str(error).split())[:200]})") from None


def _count_array_record(path: str) -> int:
    from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore

    reader = ArrayRecordReader(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


def _count_parquet(path: str) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def _converter(feature: Any) -> Callable[[Any], Any]:
    """Returns the function from parsed storage to values: text as str, images as bytes, the rest as TFDS has it."""
    from tensorflow_datasets.core import features as f

    if isinstance(feature, f.FeaturesDict):
        parts = {name: _converter(feature[name]) for name in feature}
        return lambda value: {name: part(value[name]) for name, part in parts.items() if name in value}
    if isinstance(feature, f.Sequence):
        return _sequence_converter(feature.feature)
    if isinstance(feature, f.Image):
        return bytes
    if isinstance(feature, f.Text):
        return lambda value: value.decode("utf-8") if isinstance(value, bytes) else str(value)
    return feature.decode_example_np


def _sequence_converter(inner: Any) -> Callable[[Any], Any]:
    """TFDS stores a sequence of dicts as a dict of sequences; both come back as lists (of numbers: arrays)."""
    from tensorflow_datasets.core import features as f

    if isinstance(inner, f.FeaturesDict):
        parts = {name: _sequence_converter(inner[name]) for name in inner}
        return lambda value: {name: part(value[name]) for name, part in parts.items() if name in value}
    part = _converter(inner)
    if isinstance(inner, (f.Image, f.Text, f.Sequence)):
        return lambda value: [part(item) for item in value]
    return lambda value: np.asarray(value) if isinstance(value, np.ndarray) else [part(item) for item in value]
