"""Sources: where raw examples come from, by random access.

A source maps a number to a raw example: a dict with `key` (str), usually `image` (encoded bytes) and `text` (str or
list of str), and whatever else the record holds. Sources are read from many threads at once, and can be pickled.
Whatever makes the whole data set suspect (a missing or truncated shard) fails when it is opened; whatever makes
one record unreadable raises `UserError` when that record is asked for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from vlm.data.json_list import JsonSource
from vlm.data.jsonl import JsonlSource
from vlm.data.lines import LinesSource
from vlm.data.parquet import ParquetSource
from vlm.data.tar import TarSource
from vlm.data.tfds import TfdsSource
from vlm.data.tsv import TsvSource
from vlm.data.visdial import VisDialSource
from vlm.errors import UserError, did_you_mean

KINDS = {
    "tfds": TfdsSource,
    "tar": TarSource,
    "jsonl": JsonlSource,
    "json": JsonSource,
    "parquet": ParquetSource,
    "tsv": TsvSource,
    "lines": LinesSource,
    "visdial": VisDialSource,
}
_PROBE = 16
_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,), "path": (str, tuple, list), "split": (str,), "name": (str,), "root": (str,), "index_dir": (str,),
    "fields": (Mapping,), "where": (Mapping,), "num_shards": (int,), "num_examples": (int,), "max_bytes": (int,),
    "cache_bytes": (int,), "weight": (int, float), "each": (str,), "number": (str,), "annotations": (str,),
    "frames": (int,), "columns": (tuple, list), "max_broken": (int,), "classes": (Mapping,),
    "texts": (Mapping,), "ids": (str,), "image": (str,),
}  # fmt: skip


@runtime_checkable
class Source(Protocol):
    """Random access to raw examples."""

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source that a config describes.

    Args:
        spec: `kind` (one of `KINDS`), `path`, and the options of that kind (arguments of its class). For every kind:
            `fields`, `name`, `num_examples` (the number there must be), `split` (of TFDS its own grammar; otherwise
            a range of records such as `[600:]` or `[:50%]`), `classes` (field -> names: its value becomes the
            number of the name, {"label": ("no", "yes")}). None means not given.

    Raises:
        UserError: an unknown kind or option, an option of the wrong type, incomplete data, or a field that no
            record has.
    """
    options = {str(key): value for key, value in _plain(spec).items() if value is not None}
    for key in ("weight", "stream"):  # of mixtures
        options.pop(key, None)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"data source: unknown kind {kind!r}{did_you_mean(str(kind), KINDS)}")
    allowed = set(inspect.signature(KINDS[kind]).parameters) | {"num_examples", "split", "classes"}
    for key, value in options.items():
        if key not in allowed:
            raise UserError(f"data source of kind {kind!r}: unknown option {key!r}{did_you_mean(key, allowed)}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            names = " or ".join(t.__name__ for t in _TYPES[key])
            raise UserError(f"data source option {key!r}: expected {names}, found {value!r}")
    if not options.get("path"):
        raise UserError(f"data source of kind {kind!r}: `path` is missing")
    num_examples = options.pop("num_examples", None)
    records = options.pop("split", None) if kind != "tfds" else None
    classes = options.pop("classes", None)
    source: Source = KINDS[kind](**options)
    if classes:
        source = WithClasses(source, classes)
    if records:
        source = Subset(source, records)
    if num_examples is not None and len(source) != num_examples:
        raise UserError(f"{source.name}: expected {num_examples} examples, found {len(source)}")
    _probe(source)
    return source


def open_sources(specs: Sequence[Mapping[str, Any]]) -> tuple[list[Source], list[float]]:
    """Opens the sources of a mixture; returns them with their weights (`weight` of each; none given: their sizes).

    Raises:
        UserError: as `open_source`; also when only some (of one `stream`) have a weight, or one is negative, or when
            several are numbered.
    """
    if not specs:
        raise UserError("data: no source given")
    plain = [_plain(spec) for spec in specs]
    given = [spec.get("weight") for spec in plain]
    kinds = {(spec.get("stream"), weight is None) for spec, weight in zip(plain, given, strict=True)}
    for stream, _ in kinds:
        if {(stream, True), (stream, False)} <= kinds:
            which = f" of stream {stream!r}" if stream is not None else ""
            raise UserError(f"data sources: give `weight` for all of them{which} or for none")
    if len(plain) > 1 and any(spec.get("number") is not None for spec in plain):
        raise UserError(
            "data sources: `number` counts from 0 in each of them, so that different images would have one number; "
            "expected one source, with a list of files as its `path`"
        )
    sources = [open_source(spec) for spec in plain]
    weights = [len(source) if weight is None else weight for source, weight in zip(sources, given, strict=True)]
    return sources, [float(weight) for weight in weights]


def _plain(spec: Any) -> dict[str, Any]:
    spec = spec.to_dict() if hasattr(spec, "to_dict") else spec
    if not isinstance(spec, Mapping):
        raise UserError(f"data source: expected a mapping with `kind` and `path`, found {spec!r:.80}")
    return dict(spec)


def _probe(source: Source) -> None:
    """One bad record is for the skip ledger; if all of the first are bad, the description is wrong."""
    first: UserError | None = None
    for index in range(min(_PROBE, len(source))):
        try:
            source[index]
            return
        except UserError as error:
            first = first or error
    if first is not None:
        raise first


class WithClasses:
    """A source where some fields hold the names of classes, with their numbers instead.

    Args:
        classes: field -> names, in the order of their numbers.
    """

    def __init__(self, source: Source, classes: Mapping[str, Sequence[str]]):
        for field, names in classes.items():
            if isinstance(names, str) or not isinstance(names, Sequence) or len(set(names)) < max(1, len(names)):
                raise UserError(f"{source.name}: classes: expected different names of {field!r}, found {names!r:.80}")
        self._source, self.name = source, source.name
        self._numbers = {field: {str(name): i for i, name in enumerate(names)} for field, names in classes.items()}
        self.fingerprint = f"{source.fingerprint}{self._numbers}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for a name that is not among the classes."""
        example = dict(self._source[index])
        for field, numbers in self._numbers.items():
            value = example.get(field)
            value = value.decode(errors="replace") if isinstance(value, bytes) else value
            if str(value) not in numbers:
                where = f"{self.name}: example {example.get('key')!r}"
                raise UserError(f"{where}: {field} {value!r:.60} is not a class{did_you_mean(str(value), numbers)}")
            example[field] = numbers[str(value)]
        return example


class Subset:
    """The records `[start:stop]` of a source; bounds are numbers or percentages, as in TFDS."""

    def __init__(self, source: Source, records: str):
        match = re.fullmatch(r"\[(\d*%?):(\d*%?)\]", records)
        if not match:
            raise UserError(f"{source.name}: split {records!r}: expected a range such as [600:] or [:50%]")
        start, stop = (self._bound(text, len(source)) for text in match.groups())
        self._source, self._start = source, start or 0
        self._stop = len(source) if stop is None else stop
        if not 0 <= self._start < self._stop <= len(source):
            raise UserError(f"{source.name}: split {records!r} of {len(source)} records is empty or out of range")
        self.name = f"{source.name}{records}"
        self.fingerprint = f"{source.fingerprint}{records}"

    @staticmethod
    def _bound(text: str, length: int) -> int | None:
        if not text.strip("%"):
            return None
        return round(int(text[:-1]) * length / 100) if text.endswith("%") else int(text)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._source[self._start + index]
