"""Shard lists: which files a dataset consists of, proved complete before training starts.

A path is one file, a glob (`train/*.tar`), a brace range (`{00000..00127}.tar`, `{en,zh}.jsonl`), or a list of those.
Every way a shard can be absent (not there, empty, one of `-00003-of-00128` lost) is found here and named.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from vlm.errors import UserError

MAX_SHARDS = 1_000_000
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})")


def expand(path: str | Sequence[str], *, num_shards: int | None = None) -> list[str]:
    """Returns the files that `path` names, in a fixed order.

    Args:
        path: a file, glob, brace pattern, or list of those; `~` is expanded.
        num_shards: the number of files there must be.

    Raises:
        UserError: nothing matches, a file is missing, empty or not a regular file, a numbered shard is absent, or
            the number of files differs from `num_shards`.
    """
    patterns = [path] if isinstance(path, str) else list(path)
    if not patterns:
        raise UserError("no data path given")
    files: list[str] = []
    for pattern in patterns:
        for name in _braces(os.path.expanduser(os.fspath(pattern))):
            files.extend(_matches(name))
            if len(files) > MAX_SHARDS:
                raise UserError(f"{pattern}: names more than {MAX_SHARDS:,} shards")
    duplicates = [name for name, group in itertools.groupby(sorted(files)) if len(list(group)) > 1]
    if duplicates:
        raise UserError(f"shard listed twice: {duplicates[0]}")
    for name in files:
        _check_file(name)
    _check_numbering(files)
    if num_shards is not None and len(files) != num_shards:
        raise UserError(f"{path}: expected {num_shards} shards, found {len(files)}")
    return files


def _braces(pattern: str) -> Iterator[str]:
    """Expands `{a,b}` and `{000..012}`, leftmost first; zero padding of the first bound is kept."""
    match = _BRACE.search(pattern)
    if match is None or os.path.exists(pattern):
        yield pattern
        return
    bounds = _RANGE.fullmatch(match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        if not 0 <= last - first < MAX_SHARDS:
            raise UserError(f"{pattern}: range {{{match[1]}}} is empty or too long")
        items: Iterator[str] | list[str] = (f"{i:0{len(bounds[1])}d}" for i in range(first, last + 1))
    else:
        items = match[1].split(",")
    for item in items:
        yield from _braces(pattern[: match.start()] + item + pattern[match.end() :])


def _matches(name: str) -> list[str]:
    if os.path.exists(name):
        return [name]
    found = sorted(glob.glob(name)) if glob.has_magic(name) else []
    if not found:
        what = "no file matches" if glob.has_magic(name) else "missing shard"
        raise UserError(f"{what}: {name}")
    return found


def _check_file(name: str) -> None:
    if os.path.isdir(name):
        raise UserError(f"{name}: is a folder; give a file or a pattern such as {os.path.join(name, '*')}")
    if not os.path.isfile(name):
        raise UserError(f"{name}: not a regular file")
    if os.path.getsize(name) == 0:
        raise UserError(f"{name}: empty shard (0 bytes)")


def _check_numbering(files: Sequence[str]) -> None:
    """Names of the form `x-00003-of-00128` must be complete."""
    present: dict[tuple[str, str, int], set[int]] = {}
    for name in files:
        match = _NUMBERED.search(os.path.basename(name))
        if match:
            base = os.path.basename(name)
            head, tail = os.path.join(os.path.dirname(name), base[: match.start()]), base[match.end() :]
            present.setdefault((head, tail, int(match[2])), set()).add(int(match[1]))
    for (head, tail, count), numbers in present.items():
        absent = sorted(set(range(count)) - numbers)
        if absent:
            raise UserError(
                f"missing shard {head}-{absent[0]:05d}-of-{count:05d}{tail}: "
                f"expected {count} shards, found {len(numbers)}"
            )


class Starts:
    """Where each shard's records begin in the numbering of the whole dataset."""

    def __init__(self, lengths: Sequence[int]):
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (shard, position inside it); negative indices are refused like those past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])
