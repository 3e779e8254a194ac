"""Index of one uncompressed tar shard: members' offsets, grouped into examples, from headers alone.

Layout of the headers: POSIX ustar and pax, GNU long names. Members of one example share the path up to the first
dot of the file name (`a/0001.jpg`, `a/0001.seg.png` -> key `a/0001`, fields `jpg`, `seg.png`). Nothing is ever
extracted; anything but regular files and folders is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import posixpath
import re
import tempfile
import zipfile
from collections.abc import Iterator

import numpy as np

from vlm.errors import UserError

_BLOCK = 512
_VERSION = 1
_MAX_EXTENDED = 1 << 20  # bytes of one long-name or pax record
_MAX_MEMBERS = 5_000_000
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]{1,256})=")
_REFUSED = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "FIFO", b"S": "sparse file"}


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """Examples of one shard as flat arrays (about 17 bytes a member, so that millions fit in memory).

    Example `i` owns members `starts[i]:starts[i + 1]`; `fields` names what `field_ids` number.
    """

    starts: np.ndarray  # int64[examples + 1]
    offsets: np.ndarray  # int64[members], of the data
    sizes: np.ndarray  # int64[members], bytes
    field_ids: np.ndarray  # int32[members]
    fields: tuple[str, ...]
    key_starts: np.ndarray  # int64[examples + 1], into key_bytes
    key_bytes: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.starts) - 1

    def key(self, example: int) -> str:
        """Returns the key of one example."""
        return bytes(self.key_bytes[self.key_starts[example] : self.key_starts[example + 1]]).decode()

    def members(self, example: int) -> Iterator[tuple[str, int, int]]:
        """Yields (field, offset, size) of one example."""
        for member in range(int(self.starts[example]), int(self.starts[example + 1])):
            yield self.fields[self.field_ids[member]], int(self.offsets[member]), int(self.sizes[member])


def read_index(path: str, cache: str | None = None) -> TarIndex:
    """Returns the index of a shard, from the cache file where that is still valid.

    Args:
        path: the tar file.
        cache: folder for index files, or None for no cache. An entry counts only for the same size and mtime.

    Raises:
        UserError: compressed, truncated, garbled, empty, or holding anything that is not an example.
    """
    stat = os.stat(path)
    stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    name = hashlib.blake2b(os.path.abspath(path).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    entry = pathlib.Path(cache, f"{os.path.basename(path)}-{name}.npz") if cache else None
    if entry is not None and entry.exists():
        # An index file that cannot be read is only a lost shortcut: the shard itself decides.
        with (
            contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
            open(entry, "rb") as file,
            np.load(file) as saved,
        ):
            if np.array_equal(saved["stamp"], stamp):
                arrays = {f.name: saved[f.name] for f in dataclasses.fields(TarIndex) if f.name != "fields"}
                return TarIndex(**arrays, fields=tuple(map(str, saved["fields"])))
    index = _build(path)
    if entry is not None:
        _save(entry, index, stamp)
    return index


def _save(entry: pathlib.Path, index: TarIndex, stamp: np.ndarray) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            arrays = {f.name: getattr(index, f.name) for f in dataclasses.fields(TarIndex)}
            np.savez(file, stamp=stamp, **{**arrays, "fields": np.array(index.fields, np.str_)})
        os.replace(temporary, entry)
    except OSError as error:
        raise UserError(f"cannot write the shard index {entry}: {error.strerror}") from None


def _build(path: str) -> TarIndex:
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in _members(path):
        key, field = _split(name)
        if key is None:
            raise UserError(f"{path}: member {name!r} has no example name before its first dot")
        members = groups.setdefault(key, {})
        if field in members:
            raise UserError(f"{path}: member {name!r} appears twice")
        members[field] = (offset, size)
    if not groups:
        raise UserError(f"{path}: empty shard (a tar without files)")
    flat = [member for members in groups.values() for member in members.values()]
    fields = tuple(dict.fromkeys(field for members in groups.values() for field in members))
    numbers = {field: number for number, field in enumerate(fields)}
    keys = [key.encode() for key in groups]
    return TarIndex(
        starts=_cumulative([len(members) for members in groups.values()]),
        offsets=np.array([offset for offset, _ in flat], np.int64),
        sizes=np.array([size for _, size in flat], np.int64),
        field_ids=np.array([numbers[f] for members in groups.values() for f in members], np.int32),
        fields=fields,
        key_starts=_cumulative([len(key) for key in keys]),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
    )


def _cumulative(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])


def _split(name: str) -> tuple[str | None, str]:
    """`a/0001.seg.PNG` -> (`a/0001`, `seg.png`); no key for files such as `.DS_Store`."""
    folder, base = posixpath.split(name)
    stem, _, field = base.partition(".")
    return (posixpath.join(folder, stem) if stem else None), field.lower()


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yields (name, data offset, size) of the regular files, checking every header on the way."""
    with open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        offset, count, extended = 0, 0, {}
        while True:
            header = os.pread(file.fileno(), _BLOCK, offset)
            if len(header) < _BLOCK and offset:
                raise UserError(
                    f"{path}: truncated: {total:,} bytes end after {count} members without an end-of-archive block"
                )
            header = header.ljust(_BLOCK, b"\0")  # only a first block may be short: the parser names what it is
            if not any(header):
                _check_tail(file.fileno(), path, offset, total)
                return
            name, size, kind = _parse_header(header, path, offset)
            data = offset + _BLOCK
            if kind in b"xgLK" and size <= _MAX_EXTENDED:
                payload = os.pread(file.fileno(), size, data)
                if kind != b"g":
                    extended.update(_extended(kind, payload, path, offset))
            elif kind in b"xgLK":
                raise UserError(f"{path}: header record of {size:,} bytes at byte {offset:,} (limit {_MAX_EXTENDED:,})")
            else:
                name, size = extended.get("path", name), extended.get("size", size)
                extended = {}
            if data + size > total:
                raise UserError(
                    f"{path}: truncated: member {name!r} needs {data + size:,} bytes, the file has {total:,}"
                )
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                count += 1
                if count > _MAX_MEMBERS:
                    raise UserError(f"{path}: more than {_MAX_MEMBERS:,} members")
                yield _safe_name(name, path), data, size
            elif kind not in b"05\0xgLK":
                raise UserError(
                    f"{path}: member {name!r} is a {_REFUSED.get(kind, 'special file')}; only files are read"
                )
            offset = data + -(-size // _BLOCK) * _BLOCK


def _check_tail(descriptor: int, path: str, offset: int, total: int) -> None:
    """A second archive glued behind the first would be lost without a word."""
    tail = os.pread(descriptor, min(total - offset, 1 << 20), offset)
    if any(tail):
        raise UserError(f"{path}: data after the end-of-archive block at byte {offset:,} (archives glued together?)")


def _parse_header(header: bytes, path: str, offset: int) -> tuple[str, int, bytes]:
    try:
        stored = int(header[148:156].strip(b" \0") or b"0", 8)
        size = _number(header[124:136])
    except ValueError:
        stored, size = -1, 0
    if stored != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
        packer = next((kind for magic, kind in _COMPRESSED.items() if not offset and header.startswith(magic)), None)
        if packer:
            raise UserError(f"{path}: {packer}-compressed; random access needs a plain tar, so decompress it first")
        raise UserError(f"{path}: not a tar header at byte {offset:,} (garbled, or not a tar file)")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace"), size, header[156:157]


def _number(field: bytes) -> int:
    """Octal text, or base-256 where the top bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _extended(kind: bytes, payload: bytes, path: str, offset: int) -> dict:
    """Reads what a GNU long name or a pax record says about the member that follows."""
    if kind == b"K":
        return {}
    if kind == b"L":
        return {"path": payload.rstrip(b"\0").decode("utf-8", "backslashreplace")}
    values: dict = {}
    position = 0
    while position < len(payload):
        match = _PAX_RECORD.match(payload, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise UserError(f"{path}: garbled pax header at byte {offset:,}")
        value = payload[match.end() : end - 1]
        if match[2] == b"path":
            values["path"] = value.decode("utf-8", "backslashreplace")
        elif match[2] == b"size":
            if not value.isdigit() or len(value) > 18:
                raise UserError(f"{path}: garbled pax header at byte {offset:,}")
            values["size"] = int(value)
        elif match[2].startswith(b"GNU.sparse"):
            raise UserError(f"{path}: sparse file at byte {offset:,}; only plain files are read")
        position = end
    return values


def _safe_name(name: str, path: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or not parts:
        raise UserError(f"{path}: member name {name!r} leaves the archive")
    return "/".join(parts)
