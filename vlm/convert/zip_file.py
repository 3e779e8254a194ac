"""Finds the uncompressed members of a zip file in memory, with every offset checked against the file.

Written for PyTorch's archives: members are stored, not compressed, so that tensors can be memory-mapped. The central
directory is parsed here, because its claimed sizes have to be bounded before anything is allocated.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from vlm.errors import UserError

MAX_MEMBERS = 100_000
_MASK32 = 0xFFFFFFFF


class _Damaged(Exception):
    pass


def stored_members(path: Path, data: np.ndarray) -> dict[str, tuple[int, int]]:
    """Returns {member name: (offset of its bytes in the file, size)}.

    Args:
        path: names the file in errors.
        data: uint8[file size], usually memory-mapped.

    Raises:
        UserError: the archive is truncated, compressed, encrypted, has duplicate names or too many members.
    """
    view = data.data
    try:
        return _members(view)
    except _Damaged as error:
        raise UserError(f"{path}: {error}") from None
    except (struct.error, IndexError):
        raise UserError(f"{path}: damaged or truncated zip archive") from None


def _members(view: memoryview) -> dict[str, tuple[int, int]]:
    count, position = _directory(view)
    if count > MAX_MEMBERS:
        raise _Damaged(f"refused: {count} members, at most {MAX_MEMBERS} are accepted")
    members: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        signature, flags, method, packed, size, n_name, n_extra, n_comment, offset = struct.unpack_from(
            "<I4xHH8xIIHHH8xI", view, position
        )
        if signature != 0x02014B50:
            raise _Damaged("damaged or truncated zip archive")
        name = bytes(view[position + 46 : position + 46 + n_name]).decode("utf-8", "replace")
        extra = view[position + 46 + n_name : position + 46 + n_name + n_extra]
        size, packed, offset = _wide(extra, size, packed, offset)
        position += 46 + n_name + n_extra + n_comment
        if "/code/" in name:  # a TorchScript archive's program, compressed and of no interest
            continue
        if method != 0 or size != packed or flags & 1:
            raise _Damaged(f"refused: member {name!r} is compressed or encrypted")
        if name in members:
            raise _Damaged(f"refused: member {name!r} appears twice")
        members[name] = (_content(view, offset, size), size)
    return members


def _directory(view: memoryview) -> tuple[int, int]:
    """Number of members and offset of the central directory, from the record at the end of the file."""
    tail = bytes(view[-65557:])
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise _Damaged("damaged or truncated zip archive")
    end += len(view) - len(tail)
    count, _, offset, n_comment = struct.unpack_from("<HIIH", view, end + 10)
    if end + 22 + n_comment != len(view):
        raise _Damaged("damaged or truncated zip archive")
    if end >= 20 and bytes(view[end - 20 : end - 16]) == b"PK\x06\x07":  # zip64 locator
        (record,) = struct.unpack_from("<Q", view, end - 12)
        if bytes(view[record : record + 4]) != b"PK\x06\x06":
            raise _Damaged("damaged or truncated zip archive")
        count, _, offset = struct.unpack_from("<QQQ", view, record + 32)
    return count, offset


def _wide(extra: memoryview, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Replaces fields that do not fit 32 bits by those of the zip64 extra field, which holds only such fields."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            fields = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            size = fields.pop(0) if size == _MASK32 else size
            packed = fields.pop(0) if packed == _MASK32 else packed
            offset = fields.pop(0) if offset == _MASK32 else offset
        extra = extra[4 + length :]
    return size, packed, offset


def _content(view: memoryview, offset: int, size: int) -> int:
    """Offset of a member's bytes, behind its local header."""
    signature, n_name, n_extra = struct.unpack_from("<I22xHH", view, offset)
    start = offset + 30 + n_name + n_extra
    if signature != 0x04034B50 or start + size > len(view):
        raise _Damaged("damaged or truncated zip archive")
    return start
