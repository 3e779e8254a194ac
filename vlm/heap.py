"""The C library's heap: on CPUs, the memory of one step serves the next.

XLA hands the buffers of a step back to the C library, which hands large ones back to the system. The next step then
gets its memory page by page again, zeroed: 4 GB and a seventh of the processor time of an AltCLIP training step.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # mallopt's names for its parameters, malloc.h
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees; call it before any thread starts.

    All large blocks then come from one heap that never shrinks, which costs up to a third more memory at the peak.
    Does nothing (and returns False) where an accelerator does the work, with another C library than glibc, or if the
    environment has settings of its own for it (MALLOC_…, GLIBC_TUNABLES).
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    accelerated = any(importlib.util.find_spec(name) for name in _PLUGINS) if not platforms else platforms != "cpu"
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if accelerated or own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
