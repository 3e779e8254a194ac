"""Host memory on CPU runs: buffers that a step frees are kept for the next one."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep large freed blocks in the process; returns whether it did.

    XLA's CPU client allocates a program's temporary memory anew for every call. glibc maps such blocks from the
    kernel and unmaps them when freed, so each step pays for zeroing gigabytes page by page: up to a quarter of a
    training step's CPU time. Does nothing elsewhere than on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(*option) for option in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)))
