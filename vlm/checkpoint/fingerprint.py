"""Fingerprints of arrays: 64 bits that do not depend on sharding, host count or device.

A file checksum proves that the file is what was written, not that what was written is what was in memory. The
fingerprint closes that gap: it is taken on the device before anything is copied and again after restoring.

Every element contributes `mix(bits XOR position)`, summed modulo 2^32 in two differently mixed lanes:

* a sum of integers is exact in any order, so any mesh and any number of hosts give the same value;
* `mix` is a bijection (the finaliser of MurmurHash3), so one changed element, by one bit or by all, always
  changes the first lane; several changed or exchanged elements escape with probability 2^-64;
* it is one pass over memory without temporaries, faster than any copy, and counts NaN and Inf on the way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

HOST_BYTES = 2**20  # below, hashing a copy on the host is cheaper than compiling for the shape
_CHUNK = 2**20  # elements that the host form takes at once, to stay in the cache
_GOLDEN = 0x9E3779B1


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What one array holds: `digest`, 16 hexadecimal digits, and whether all its elements are finite."""

    digest: str
    finite: bool


def fingerprints(leaves: Mapping[str, jax.Array]) -> dict[str, Fingerprint]:
    """Fingerprints of device arrays, computed where they are; every process gets the same result.

    All processes must call it together with the same leaves. Blocks until the arrays are computed.
    """
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        local = leaf.is_fully_addressable or leaf.is_fully_replicated
        small = local and leaf.nbytes <= HOST_BYTES
        # One at a time: with 32 programs in flight, jax stops in the midst of giving the next one to a host's CPU
        # devices, and those of another host wait in its collective for good.
        found[name] = _host_lanes(np.asarray(leaf)) if small else jax.block_until_ready(_device_lanes(leaf))
    return {name: _fingerprint(lanes) for name, lanes in jax.device_get(found).items()}


def host_fingerprint(array: np.ndarray) -> Fingerprint:
    """The fingerprint of an array in host memory, equal to that of the device array with these values."""
    return _fingerprint(_host_lanes(array))


def _fingerprint(lanes: np.ndarray) -> Fingerprint:
    return Fingerprint(f"{lanes[0]:08x}{lanes[1]:08x}", not lanes[2])


def _device_lanes(leaf: jax.Array) -> jax.Array:
    sharding = leaf.sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return _compiled(replicated)(leaf)


@functools.lru_cache(maxsize=64)
def _compiled(out_sharding: NamedSharding | None) -> Any:
    return jax.jit(_reduce_on_device, out_shardings=out_sharding)


def _reduce_on_device(array: jax.Array) -> jax.Array:
    """The three lanes as one variadic reduction: XLA fuses it to one pass, and vectorises it, only so."""
    words = _device_words(array)
    iota = [jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in range(words.ndim)]
    position = functools.reduce(jnp.add, (axis * _stride(d) for d, axis in enumerate(iota)))
    first, second = _mix(words, position)
    bad = jnp.broadcast_to(_not_finite(jnp, array).reshape(array.shape + (1,) * (words.ndim - array.ndim)), words.shape)
    zero = jnp.uint32(0)
    return jnp.stack(
        jax.lax.reduce(
            (first, second, bad.astype(jnp.uint32)),
            (zero, zero, zero),
            lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]),
            tuple(range(words.ndim)),
        )
    )


def _device_words(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    size = array.dtype.itemsize
    if size < 4:
        words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(array, jnp.uint32)
    return words if words.ndim else words.reshape(1)


def _host_lanes(array: np.ndarray) -> np.ndarray:
    """The three lanes of an array on the host, some rows at a time."""
    lanes = np.zeros(3, np.uint32)
    if not array.size:
        return lanes
    array = np.ascontiguousarray(array).reshape(array.shape or (1,))
    size = array.dtype.itemsize
    words = array.view(np.dtype(f"uint{8 * min(size, 4)}"))
    if size > 4:
        words = words.reshape(*array.shape, size // 4)
    tail = np.zeros(words.shape[1:], np.uint32)
    for d, length in enumerate(words.shape[1:], start=1):
        axis = np.arange(length, dtype=np.uint32) * _stride(d)
        tail += axis.reshape((length,) + (1,) * (words.ndim - 1 - d))
    rows = max(1, _CHUNK // max(1, tail.size))
    for start in range(0, len(words), rows):
        chunk = words[start : start + rows].astype(np.uint32)
        head = np.arange(start, start + len(chunk), dtype=np.uint32) * _stride(0)
        position = head.reshape((len(chunk),) + (1,) * tail.ndim) + tail
        first, second = _mix(chunk, position)
        bad = np.any(_not_finite(np, array[start : start + rows]))
        lanes[:2] += np.array([np.sum(first, dtype=np.uint32), np.sum(second, dtype=np.uint32)])
        lanes[2] |= np.uint32(bad)
    return lanes


def _mix(words: Any, position: Any) -> tuple[Any, Any]:
    """Two well mixed uint32 per element; the first is a bijection of `words` at every position."""
    first = words ^ position
    first = (first ^ (first >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    first = (first ^ (first >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    first = first ^ (first >> np.uint32(16))
    second = (first + position) * np.uint32(0x27D4EB2F)
    return first, second ^ (second >> np.uint32(15))


def _stride(axis: int) -> np.uint32:
    """Odd multiplier of an axis: powers of the golden ratio keep the positions of an array apart."""
    return np.uint32(pow(_GOLDEN, axis + 1, 2**32))


def _not_finite(xp: ModuleType, array: Any) -> Any:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return ~xp.isfinite(array)
    return xp.zeros(array.shape, bool)
