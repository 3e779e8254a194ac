"""Image files named by records: read whole, bounded, and never from outside the data's own folder."""

from __future__ import annotations

import os
import stat
from typing import Any

from vlm.errors import UserError


class ImageFiles:
    """Reads image files relative to a folder.

    Without a `root`, paths are relative to `beside`; absolute paths, `..` and links that lead out are refused.
    With a `root`, which the user chose, paths are relative to it, may be absolute, and must stay inside as
    written; links are followed (data sets are often farms of links).
    """

    def __init__(self, root: str | None, beside: str, max_bytes: int):
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
        if isinstance(value, bytes):
            return value
        if isinstance(value, (list, tuple)):
            return [self.read(item, where) for item in value]
        if not isinstance(value, str) or not value or "\0" in value:
            raise UserError(f"{where}: image must be a path, found {value!r:.80}")
        path = self._locate(value, where)
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
            raise UserError(f"{where}: image {value!r}: {(error.strerror or 'cannot open').lower()}") from None
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

    def _locate(self, value: str, where: str) -> str:
        if not self._chosen and (os.path.isabs(value) or ".." in value.split("/")):
            raise UserError(f"{where}: image {value!r} leaves the data's folder (set `root` to allow other folders)")
        path = os.path.normpath(os.path.join(self._root, value))
        inside = path if self._chosen else os.path.realpath(path)
        root = self._root if self._chosen else os.path.realpath(self._root)
        if os.path.commonpath([inside, root]) != root:
            raise UserError(f"{where}: image {value!r} lies outside {self._root}")
        return path
