"""Walks through one JSON document element by element, so that a large list is never held as objects all at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from vlm.data.fields import parse_json
from vlm.errors import UserError

MAX_FILE = 8 << 30
_DECODER = json.JSONDecoder()
_skip = re.compile(r"[ \t\n\r]*").match


class Element(NamedTuple):
    """One element of a list, or one other member of the outer object.

    `section`: the list's or member's name in the outer object, "" in a document that is a list; `number`: from 1 in its
    list, 0 for other members; `start`, `stop`: its bytes in the file.
    """

    section: str
    number: int
    start: int
    stop: int
    value: Any


def read_document(path: str) -> bytes:
    """Returns the file's bytes.

    Raises:
        UserError: compressed, or larger than the limit.
    """
    size = os.path.getsize(path)
    if size > MAX_FILE:
        raise UserError(f"{path}: {size:,} bytes, more than the limit of {MAX_FILE:,} (use JSON Lines)")
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: gzip-compressed; decompress it first")
    return data


def scan(data: bytes, path: str, within: str | None = None) -> Iterator[Element]:
    """Yields the elements of a document that is a list, or an object of lists and other members.

    Of the member `within`, if it is an object, the elements of its own members are.

    Raises:
        UserError: not JSON, or cut short; the line names `path` and the record.
    """
    text = data.decode("latin-1")  # one character a byte: structure and positions are those of UTF-8
    at = _after(text, 3 if data.startswith(b"\xef\xbb\xbf") else 0)
    if text[at : at + 1] == "[":
        end = yield from _list(data, text, at, "", path)
    elif text[at : at + 1] == "{":
        end = yield from _object(data, text, at, path, within)
    else:
        raise UserError(f"{path}: not JSON (expected a list or an object)")
    end = _after(text, end)
    if end != len(text):
        raise UserError(f"{path}: not JSON (more at character {end} after its end)")


def _object(data: bytes, text: str, at: int, path: str, within: str | None = None) -> Generator[Element, None, int]:
    at = _after(text, at + 1)
    if text[at : at + 1] == "}":
        return at + 1
    while True:
        name, at = _value(data, text, at, path)
        at = _after(text, at)
        if not isinstance(name, str) or text[at : at + 1] != ":":
            raise UserError(f"{path}: not JSON (expected a name and a colon at character {at}; truncated?)")
        at = _after(text, at + 1)
        if text[at : at + 1] == "[":
            at = yield from _list(data, text, at, name, path)
        elif text[at : at + 1] == "{" and name == within:
            at = yield from _object(data, text, at, path)
        else:
            start = at
            value, at = _value(data, text, at, f"{path}: {name}")
            yield Element(name, 0, start, at, value)
        at, done = _next(text, at, "}", path)
        if done:
            return at


def _list(data: bytes, text: str, at: int, section: str, path: str) -> Generator[Element, None, int]:
    at, number = _after(text, at + 1), 0
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        number += 1
        where = f"{path}: {section} record {number}" if section else f"{path}: record {number}"
        start = at
        value, at = _value(data, text, at, where)
        yield Element(section, number, start, at, value)
        at, done = _next(text, at, "]", where)
        if done:
            return at


def _next(text: str, at: int, end: str, where: str) -> tuple[int, bool]:
    at = _after(text, at)
    mark = text[at : at + 1]
    if mark not in (",", end) or not mark:
        raise UserError(f"{where}: not JSON (expected , or {end} at character {at}; truncated?)")
    return (at + 1, True) if mark == end else (_after(text, at + 1), False)


def _value(data: bytes, text: str, at: int, where: str) -> tuple[Any, int]:
    try:
        value, stop = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at character {error.pos}; truncated?)") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    raw = data[at:stop]
    return (value if raw.isascii() else parse_json(raw, where)), stop


def _after(text: str, at: int) -> int:
    match = _skip(text, at)
    return match.end() if match else at
