"""The skip ledger: every example that could not be read, written down once, so that no loss of data is silent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from vlm.errors import UserError


class FatalDataError(UserError):
    """A wrong input that is not one example's fault, so that it stops the run instead of being skipped."""


@dataclasses.dataclass(frozen=True)
class Skip:
    """One unreadable example: `sha256` is that of its image bytes (of its text if none, empty if unread)."""

    source: str
    sample: int
    key: str
    error: str
    sha256: str


class SkipLedger:
    """Appends to `folder/skipped.jsonl` (`skipped-<host>.jsonl` on hosts above 0); None keeps it in memory.

    Entries already in any host's file are known, so restarts and other host counts add nothing twice.
    """

    def __init__(self, folder: str | os.PathLike | None, host_index: int = 0):
        self.entries: list[Skip] = []
        self._known: set[tuple[str, int]] = set()
        self._path = None
        if folder is not None:
            name = f"skipped-{host_index}.jsonl" if host_index else "skipped.jsonl"
            self._path = pathlib.Path(folder) / name
            for path in sorted(pathlib.Path(folder).glob("skipped*.jsonl")):
                self._load(path)

    def _load(self, path: pathlib.Path) -> None:
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data) and path == self._path:
            os.truncate(path, len(complete))  # a line that a crash cut off; the example is met again
        try:
            entries = [Skip(**json.loads(line)) for line in complete.splitlines()]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not a skip ledger ({error})") from None
        for entry in entries:
            self._known.add((entry.source, entry.sample))
            self.entries.append(entry)

    def add(self, entry: Skip) -> bool:
        """Writes the entry down durably unless its example is known; returns whether it was new."""
        if (entry.source, entry.sample) in self._known:
            return False
        self._known.add((entry.source, entry.sample))
        self.entries.append(entry)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                file.write(json.dumps(dataclasses.asdict(entry)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        return True


def digest(example: Mapping[str, Any] | None) -> str:
    """Returns the SHA-256 of what made an example unreadable: its image bytes, else its text."""
    content = (example or {}).get("image", (example or {}).get("text"))
    if content is None:
        return ""
    parts = content if isinstance(content, (list, tuple)) else [content]
    encoded = (p if isinstance(p, bytes) else str(p).encode("utf-8", "surrogatepass") for p in parts)
    return hashlib.sha256(b"".join(encoded)).hexdigest()
