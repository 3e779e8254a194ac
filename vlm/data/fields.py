"""Field mapping: how a record's own field names become `image`, `text`, and whatever else a model reads.

A mapping is written as `{"image": "jpg;png;webp", "text": "json/caption"}`: ours on the left, on the right the
names in the record, alternatives separated by `;` (first present wins), nesting by `/`. Braces build a string from
fields, padded with zeros where asked: `{"image": "val2014/COCO_val2014_{image_id:012d}.jpg"}`. With a mapping only its
fields (and `key`) are returned, and each must be there; without one, records keep all their fields and the
usual names (`jpg`, `txt`, ...) are known.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from vlm.errors import UserError, did_you_mean

_ABSENT = object()
_PLACE = re.compile(r"\{([^{}:]+)(?::0(\d{1,2})d)?\}")
_IMAGE = "image;jpg;jpeg;png;webp;jpg_bytes;image_bytes"
_TEXT = "text;txt;caption;captions;TEXT;json/caption;json/text"
DEFAULTS = {"image": _IMAGE, "text": _TEXT}


@dataclasses.dataclass(frozen=True)
class FieldMap:
    """`mapping`: (our name, names in the record in order of preference); `strict`: only those, all required."""

    mapping: tuple[tuple[str, tuple[str, ...]], ...]
    strict: bool

    @classmethod
    def parse(cls, fields: Mapping[str, str] | None) -> FieldMap:
        """Reads a mapping as written in a config; `None` or empty means the usual names."""
        for ours, theirs in (fields or {}).items():
            if not isinstance(ours, str) or not isinstance(theirs, str) or not theirs.strip("; "):
                raise UserError(f"fields: expected name: 'name in the record', found {ours!r}: {theirs!r}")
        pairs = tuple(
            (ours, tuple(name.strip() for name in theirs.split(";") if name.strip()))
            for ours, theirs in (fields or DEFAULTS).items()
        )
        return cls(pairs, strict=bool(fields))

    def reads(self, name: str) -> bool:
        """Whether the record's field `name` can contribute, so that readers fetch nothing else."""
        return not self.strict or any(
            part == name or part.startswith(name + "/")
            for _, choices in self.mapping
            for choice in choices
            for part in (choice, *(place for place, _ in _PLACE.findall(choice)))
        )

    def needed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The entries that the mapping reads; all where it needs an absent one, so that messages can list them."""
        found = all(any(lookup(record, choice) is not _ABSENT for choice in choices) for _, choices in self.mapping)
        return {name: value for name, value in record.items() if not found or self.reads(name)}

    def apply(self, record: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
        """Returns the example of `record`.

        Raises:
            UserError: a mapped field is absent; the line lists what the record has. `where` names the record.
        """
        example: dict[str, Any] = {"key": key} if self.strict else {"key": key, **record}
        for ours, choices in self.mapping:
            for choice in choices:
                value = lookup(record, choice)
                if value is not _ABSENT:
                    example[ours] = value
                    break
            else:
                if self.strict:
                    present = ", ".join(paths(record)) or "nothing"
                    hint = did_you_mean(choices[0], paths(record)) if len(choices) == 1 else ""
                    hint = hint if "did you mean" in hint else ""
                    raise UserError(f"{where}: field {ours!r} needs {' or '.join(choices)!r}, found {present}{hint}")
        example["key"] = str(example["key"])
        return example


def lookup(record: Any, path: str) -> Any:
    """Follows `a/b` through nested dicts (through lists of dicts element by element); names may hold `/`."""
    if isinstance(record, list) and record and all(isinstance(item, Mapping) for item in record):
        values = [lookup(item, path) for item in record]
        return _ABSENT if any(value is _ABSENT for value in values) else values
    if not isinstance(record, Mapping):
        return _ABSENT
    if path in record:
        return record[path] if record[path] is not None else _ABSENT
    if "{" in path:
        return _filled(record, path)
    parts = path.split("/")
    for cut in range(len(parts) - 1, 0, -1):
        head = "/".join(parts[:cut])
        if head in record:
            return lookup(record[head], "/".join(parts[cut:]))
    return _ABSENT


def _filled(record: Mapping[str, Any], template: str) -> Any:
    """Puts fields into `{name}` and, with zeros before a number, into `{name:012d}`."""
    places = {match[0]: (lookup(record, match[1]), match[2]) for match in _PLACE.finditer(template)}
    for place, (value, width) in places.items():
        if isinstance(value, bool) or not isinstance(value, (str, int)) or (width and not str(value).isdigit()):
            return _ABSENT
        template = template.replace(place, str(value).zfill(int(width or 0)))
    return template


def paths(record: Mapping[str, Any]) -> list[str]:
    """Names that a mapping could refer to, two levels deep, for messages."""
    names: list[str] = []
    for name, value in record.items():
        inner = value[0] if isinstance(value, list) and value else value
        names += [f"{name}/{sub}" for sub in inner] if isinstance(inner, Mapping) else [str(name)]
    return names


def parse_json(data: bytes | str, where: str) -> Any:
    """Parses JSON of one record; nesting beyond what the parser takes is an error like any other.

    Raises:
        UserError: not JSON, not UTF-8, or nested too deeply; `where` names the record.
    """
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
