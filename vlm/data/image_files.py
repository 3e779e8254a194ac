"""Image files named by records: read whole, bounded, and never from outside the data's own folder."""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Any

from vlm.errors import UserError

# What is wrong with a name, unlike storage that fails: the record is skipped, and the run goes on.
_OF_THE_NAME = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)
_OF_THE_NAME += (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)


class ImageFiles:
    """Reads image files relative to a folder.

    Without a `root`, paths are relative to `beside`; absolute paths, `..` and links that lead out are refused.
    With a `root`, which the user chose, paths are relative to it, may be absolute, and must stay inside as
    written; links are followed (data sets are often farms of links).

    With `frames`, an image is a video: a folder of picture files or a list of them, of which so many are read, evenly
    spaced from the first one on.
    """

    def __init__(self, root: str | None, beside: str, max_bytes: int, frames: int | None = None):
        if frames is not None and frames < 1:
            raise UserError(f"frames: expected at least 1, found {frames}")
        self._frames = frames
        self._chosen = root is not None
        self._root = os.path.abspath(os.path.expanduser(root) if root is not None else beside)
        self._max_bytes = max_bytes
        if self._chosen and not os.path.isdir(self._root):
            raise UserError(f"root: no such folder {root}")

    def read(self, value: Any, where: str) -> Any:
        """Returns the bytes of the file that `value` names; of a list of names a list; bytes unchanged.

        Raises:
            UserError: the path leaves the folder, or there is no such regular file, or it is empty or too large.
        """
        if self._frames is not None:
            names = value if isinstance(value, (list, tuple)) else self._folder(value, where)
            if not names:
                raise UserError(f"{where}: image {value!r:.80} has no frames")
            value = [names[number * len(names) // self._frames] for number in range(self._frames)]
        if isinstance(value, (list, tuple)):
            return [self._read(item, where) for item in value]
        return self._read(value, where)

    def _read(self, value: Any, where: str) -> bytes:
        if isinstance(value, bytes):
            return value
        if not _is_path(value):
            raise UserError(f"{where}: image must be a path, found {value!r:.80}")
        path = self._locate(value, where)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            if error.errno not in _OF_THE_NAME:
                raise
            raise UserError(f"{where}: image {value!r:.200}: {(error.strerror or 'cannot open').lower()}") from None
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise UserError(f"{where}: image {value!r} is not a regular file")
            if not 0 < info.st_size <= self._max_bytes:
                raise UserError(f"{where}: image {value!r} has {info.st_size:,} bytes (limit {self._max_bytes:,})")
            with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)

    def _folder(self, value: Any, where: str) -> list[str]:
        """The files of a folder, in the order of the numbers in their names."""
        if not _is_path(value):
            raise UserError(f"{where}: image must be a folder of frames, found {value!r:.80}")
        try:
            names = [name for name in os.listdir(self._locate(value, where)) if not name.startswith(".")]
        except OSError as error:
            reason = (error.strerror or "cannot open").lower()
            raise UserError(f"{where}: image {value!r}: expected a folder of frames: {reason}") from None
        parts = {name: re.split(r"(\d+)", name) for name in names}  # text and numbers alternate
        order = sorted(names, key=lambda name: [int(x) if i % 2 else x for i, x in enumerate(parts[name])])
        return [f"{value}/{name}" for name in order]

    def _locate(self, value: str, where: str) -> str:
        if not self._chosen and (os.path.isabs(value) or ".." in value.split("/")):
            raise UserError(f"{where}: image {value!r} leaves the data's folder (set `root` to allow other folders)")
        path = os.path.normpath(os.path.join(self._root, value))
        inside = path if self._chosen else os.path.realpath(path)
        root = self._root if self._chosen else os.path.realpath(self._root)
        if os.path.commonpath([inside, root]) != root:
            raise UserError(f"{where}: image {value!r} lies outside {self._root}")
        return path


def _is_path(value: Any) -> bool:
    """Whether the system takes it as a name: no text with half a surrogate pair, as JSON may hold it."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True
