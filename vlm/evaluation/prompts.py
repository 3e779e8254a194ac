"""Class names and prompt templates, in any language, from CLIP_benchmark's JSON files or plain text.

{"imagenet1k": ["tench", "goldfish", …], "cifar10": […]}       class names of several data sets
{"imagenet1k": ["a photo of a {c}.", "a {c}.", …]}             templates; duplicates are kept, they weight the mean
["tench", "goldfish"]                                          one list
{"0": "tench", "1": "goldfish"}                                one name per class number
tench⏎goldfish                                                 a text file, one per line
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import UserError, did_you_mean
from vlm.strict import unique_keys

MAX_BYTES = 64 << 20
_HOLES = ("{c}", "{}")


def load_classnames(path: str | Path, dataset: str | None = None) -> list[str]:
    """The names in order of class number.

    Args:
      dataset: which entry of a file with several.

    Raises:
      UserError: a file of another form, an unknown data set, an empty name.
    """
    value = _entry(_read(path, "class names"), dataset, path, "class names")
    if isinstance(value, Mapping):
        numbers = [str(number) for number in range(len(value))]
        if sorted(value) != sorted(numbers):
            raise UserError(f"{path}: expected class numbers 0 to {len(value) - 1} as keys, found {_some(value)}")
        value = [value[number] for number in numbers]
    return _strings(value, path, "class names")


def load_templates(source: str | Path | Sequence[str], dataset: str | None = None) -> list[str]:
    """The templates, duplicates included, from a file or given as they are.

    Raises:
      UserError: a file of another form, an unknown data set, a template without `{c}`.
    """
    if isinstance(source, (str, Path)):
        value = _strings(_entry(_read(source, "templates"), dataset, source, "templates"), source, "templates")
    else:
        value = _strings(list(source), "templates", "templates")
    for template in value:
        if not any(hole in template for hole in _HOLES):
            raise UserError(f"{source if isinstance(source, (str, Path)) else 'templates'}: no {{c}} in {template!r}")
    return value


def fill(template: str, name: str) -> str:
    """The prompt for one class; only the placeholder is special, other braces stay."""
    return template.replace(_HOLES[0] if _HOLES[0] in template else _HOLES[1], name)


def fingerprint(names: Sequence[str], templates: Sequence[str]) -> str:
    """SHA-256 of names and templates in their order."""
    return hashlib.sha256(json.dumps([list(names), list(templates)], ensure_ascii=False).encode()).hexdigest()


def _read(path: str | Path, what: str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what}: no such file: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: expected {what} of at most {MAX_BYTES >> 20} MiB, found {path.stat().st_size} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from None
    if path.suffix != ".json":
        return [line for line in (line.strip() for line in text.splitlines()) if line]
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _entry(value: Any, dataset: str | None, path: str | Path, what: str) -> Any:
    """The list (or numbered names) of one data set."""
    if not isinstance(value, Mapping) or all(isinstance(item, str) for item in value.values()):
        return value
    if dataset is None and len(value) == 1:
        return next(iter(value.values()))
    if dataset is None:
        raise UserError(f"{path}: holds {what} of several data sets, set `dataset` to one of {_some(value)}")
    if dataset not in value:
        raise UserError(f"{path}: no {what} for data set {dataset!r}{did_you_mean(dataset, value)}")
    return value[dataset]


def _strings(value: Any, path: str | Path, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}: expected {what} as a list of strings, found {_describe(value)}")
    if not value:
        raise UserError(f"{path}: expected {what}, found none")
    empty = [number for number, item in enumerate(value) if not item.strip()]
    if empty:
        raise UserError(f"{path}: {what}: number {empty[0]} is empty")
    for number, item in enumerate(value):
        if any("\ud800" <= letter <= "\udfff" for letter in item):  # JSON can hold half a pair
            raise UserError(f"{path}: {what}: number {number} is not valid Unicode: {item!r:.80}")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return "a list with " + ", ".join(sorted({type(item).__name__ for item in value}))
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _some(keys: Mapping[str, Any]) -> str:
    names = list(map(str, keys))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
