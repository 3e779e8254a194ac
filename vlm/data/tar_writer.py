"""Writes examples as a tar shard that `tar.TarSource` reads: the same examples give the same bytes, anywhere."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from vlm.errors import UserError
from vlm.manifest import fsync_directory

_BLOCK = tarfile.BLOCKSIZE


class TarWriter:
    """A shard under construction; it appears under its name when `finish` is called, whole, or not at all.

    Until then it is the hidden file `.NAME.tmp` beside it, locked, so that two processes cannot write one shard. What a
    killed process left there is overwritten. Headers hold names and sizes, and constants for everything else.

    Raises:
        UserError: the file cannot be written (no space, no permission), or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.records = 0
        self._size, self._digest, self._done = 0, hashlib.sha256(), False
        self._temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self._file = self._temporary.open("ab")
        except OSError as error:
            raise self._problem(error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path}: another process is writing it") from None
        except OSError as error:
            self._file.close()
            raise self._problem(error) from None

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends one example: its members by extension (`{"jpg": ..., "txt": ...}`). Keys must not repeat."""
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(data)
            self._write(header.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict") + data + bytes(-len(data) % _BLOCK))
        self.records += 1

    def finish(self) -> tuple[int, str]:
        """Makes the shard durable under its name; returns its bytes and SHA-256. Nothing appears without examples."""
        if not self.records:
            self.discard()
            self.path.unlink(missing_ok=True)  # of an earlier, unfinished attempt on other data
            return 0, ""
        self._write(bytes(2 * _BLOCK))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self.path)
            self._file.close()
            fsync_directory(self.path.parent)
        except OSError as error:
            raise self._problem(error) from None
        self._done = True
        return self._size, self._digest.hexdigest()

    def discard(self) -> None:
        """Removes what has been written, if it was not finished."""
        if not self._done:
            self._done = True
            self._temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what could not be written is not wanted
                self._file.close()

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._problem(error) from None
        self._digest.update(data)
        self._size += len(data)

    def _problem(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written: {error.strerror or error}")
