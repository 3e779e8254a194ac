"""The leaves of a training state by name, and what the manifest records of each.

A state is any pytree of arrays; on disk it is the nested dict of its path names, so that optimizer tuples and
dataclasses leave no trace there and `params` can be read without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from vlm.checkpoint.fingerprint import Fingerprint
from vlm.errors import UserError
from vlm.tree import listing

Records = dict[str, dict[str, Any]]  # name -> {"shape", "dtype", "hash", "key" (PRNG keys only)}


def named_leaves(state: Any) -> dict[str, Any]:
    """Returns {"params/text/…": leaf} of a pytree, in its order. `None` and empty containers vanish."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if name in leaves:
            raise UserError(f"checkpoint: two leaves of the state are called {name!r}")
        leaves[name] = leaf
    return leaves


def stored_arrays(leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The arrays that go to disk: typed PRNG keys as their integers, NumPy arrays as jax arrays.

    Raises:
        UserError: a leaf that would be saved as something else than it is or could not be restored: Python
            numbers, strings, 64-bit NumPy values without x64, complex or sub-byte types, in several processes
            an array that only one of them holds.
    """
    arrays = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype == jax.dtypes.canonicalize_dtype(leaf.dtype):
            leaf = jnp.asarray(leaf)
        if not isinstance(leaf, jax.Array):
            kind = f"{leaf.dtype} NumPy value" if isinstance(leaf, np.ndarray | np.generic) else type(leaf).__name__
            raise UserError(f"checkpoint: leaf {name!r} is a {kind}, expected a jax array, e.g. jnp.int32")
        if jax.process_count() > 1 and leaf.is_fully_addressable:
            raise UserError(f"checkpoint: leaf {name!r} lives in one process only, expected a global array")
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or leaf.dtype.name in ("int4", "uint4", "int2", "uint2"):
            raise UserError(f"checkpoint: leaf {name!r} has dtype {leaf.dtype}, which is not supported")
        arrays[name] = leaf
    return arrays


def make_records(
    leaves: Mapping[str, Any], arrays: Mapping[str, jax.Array], prints: Mapping[str, Fingerprint]
) -> Records:
    """What the manifest says of every leaf: stored shape and dtype, fingerprint, kind of PRNG key."""
    records: Records = {}
    for name, array in arrays.items():
        records[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "hash": prints[name].digest}
        if _is_key(leaves[name]):
            records[name]["key"] = str(jax.random.key_impl(leaves[name]))
    return records


def stored_targets(abstract: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The stored form, shape, dtype and sharding, of the arrays that are wanted back."""
    targets = {}
    for name, leaf in abstract.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise UserError(f"checkpoint: target {name!r} is a {type(leaf).__name__}, expected a ShapeDtypeStruct")
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            sharding = SingleDeviceSharding(jax.local_devices()[0])
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        targets[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return targets


def restored_leaf(array: jax.Array, record: Mapping[str, Any]) -> jax.Array:
    """Turns stored integers back into the typed PRNG key they were."""
    return jax.random.wrap_key_data(array, impl=record["key"]) if "key" in record else array


def check_structure(where: str, records: Records, abstract: Mapping[str, Any]) -> None:
    """Compares a checkpoint's leaves with those that are wanted.

    Raises:
        UserError: one line listing every leaf that is missing, unknown or of another shape, dtype or kind.
    """
    problems = []
    targets = stored_targets(abstract)
    if missing := [name for name in targets if name not in records]:
        problems.append(f"missing in the checkpoint: {listing(missing)}")
    if unknown := [name for name in records if name not in targets]:
        problems.append(f"unknown to this model and optimizer: {listing(unknown)}")
    different = []
    for name in targets.keys() & records.keys():
        found, wanted = _describe(records[name]), _describe_target(abstract[name], targets[name])
        if found != wanted:
            different.append(f"{name} is {found}, expected {wanted}")
    if different:
        problems.append("; ".join(sorted(different)[:20]) + (" …" if len(different) > 20 else ""))
    if problems:
        raise UserError(f"{where} does not fit this configuration: {'; '.join(problems)}")


def _describe(record: Mapping[str, Any]) -> str:
    kind = f"PRNG key {record['key']}" if "key" in record else record["dtype"]
    return f"{kind}{list(record['shape'])}"


def _describe_target(leaf: Any, target: jax.ShapeDtypeStruct) -> str:
    kind = f"PRNG key {_key_impl(leaf)}" if _is_key(leaf) else str(target.dtype)
    return f"{kind}{list(target.shape)}"


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> str:
    """Name of the generator of a (possibly abstract) key, "threefry2x32" for instance."""
    names = []

    def record(key: jax.Array) -> jax.Array:
        names.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    jax.eval_shape(record, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return names[0]
