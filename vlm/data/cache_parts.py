"""A cache of `teacher_cache` in the making: parts, each whole or not there, that are joined when all are.

The folder holds `about.json` (what the parts depend on) and `part-00000.npz`, ...: keys and rows of so many records, in
their order. Any process may write any part; which did makes no difference to the joined cache, nor does when.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from vlm.data.teacher_cache import Key, decode, item_key, stored_rows, write_cache
from vlm.errors import UserError
from vlm.manifest import fsync_directory, write_atomically
from vlm.strict import plain

ABOUT = "about.json"


@dataclasses.dataclass(frozen=True)
class CacheParts:
    """The parts of one cache.

    Attributes:
        path: their folder.
        about: what they depend on, as JSON has it: "dtype", "teacher", and what else; "vocab_size" of visual words.
    """

    path: pathlib.Path
    about: Mapping[str, Any]

    def begin(self) -> None:
        """Notes what the parts depend on.

        Raises:
            UserError: see `check`.
        """
        if (self.path / ABOUT).exists():
            self.check()
        else:
            write_atomically(self.path / ABOUT, json.dumps(plain(self.about), indent=1).encode())

    def forget(self) -> None:
        """Removes the note of a folder in which nothing was finished."""
        if not self.finished():
            (self.path / ABOUT).unlink(missing_ok=True)

    def check(self) -> None:
        """Compares with what the folder was begun with.

        Raises:
            UserError: with the names of what differs.
        """
        try:
            found = json.loads((self.path / ABOUT).read_text(encoding="utf-8"))
            wanted = json.loads(json.dumps(plain(self.about)))
            differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.path / ABOUT}: cannot be read ({error}); is this folder shared by all hosts?"
            ) from None
        if differing:
            raise UserError(f"{self.path}: begun with other {', '.join(differing)} (remove it to start over)")

    def finished(self) -> list[int]:
        """The numbers of the parts that are there."""
        matches = (re.fullmatch(r"part-(\d{5,})\.npz", path.name) for path in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def write(self, number: int, items: Sequence[Any], rows: Num[np.ndarray, "b dim"] | None) -> None:
        """Writes one part; `rows` None: of no item.

        Raises:
            UserError: see `write_cache`.
        """
        about, buffer = self.about, io.BytesIO()
        stored = np.zeros((0, 0)) if rows is None else stored_rows(items, rows, about["dtype"], about.get("vocab_size"))
        keys = np.frombuffer(b"".join(map(item_key, items)), np.uint8).reshape(-1, 16)
        np.savez(buffer, keys=keys, rows=stored)
        write_atomically(self._file(number), buffer.getvalue())

    def join(self, output: pathlib.Path, count: int) -> int:
        """Makes the cache of parts 0 to `count` - 1 and removes them; returns how many items it holds.

        Raises:
            UserError: a part is missing or damaged, or there is no item at all.
        """
        if missing := sorted({*range(count)} - {*self.finished()}):
            raise UserError(f"{self._file(missing[0])}: missing; is this folder shared by all hosts?")
        for begun in self.path.glob("*cache*"):  # a stopped process left it
            shutil.rmtree(begun)
        options = {"dtype": self.about["dtype"], "vocab_size": self.about.get("vocab_size")}
        made = self.path / "cache"
        total = write_cache(made, self._parts(count), teacher=self.about["teacher"], **options)
        os.rename(made, output)
        fsync_directory(output.parent)
        shutil.rmtree(self.path)
        return total

    def _parts(self, count: int) -> Iterator[tuple[list[Key], np.ndarray]]:
        for number in range(count):
            path = self._file(number)
            try:
                with np.load(path, allow_pickle=False) as part:
                    keys, rows = part["keys"], part["rows"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: damaged ({error}); remove it, and the same command makes it again") from None
            if len(keys):
                yield [Key(key.tobytes()) for key in keys], decode(rows, self.about["dtype"])

    def _file(self, number: int) -> pathlib.Path:
        return self.path / f"part-{number:05d}.npz"
