"""Packing: the texts of several rows laid end to end in one, without the padding that follows each of them.

Tokens see those of their own row only, so that what is computed for them is what it was; an encoder of B rows of L
tokens has G rows of T tokens to compute (Krell et al. 2021, arXiv 2107.02027, pack examples ahead of time; here the
rows of a batch are packed as they come). A packing is int32[G, T]: which of the B/G · L places of a group's rows, read
row after row, stands at each of the T packed ones. Padding fills up what the longest group leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vlm.layers.arrays import AnyArray
from vlm.layers.transformer import StackOutput


def pack(x: AnyArray, packing: Int[AnyArray, "g t"]) -> Array:
    """The packed places of an array [B, L, …], as [G, T, …]."""
    rows = jnp.asarray(x).reshape(len(packing), -1, *x.shape[2:])
    return jnp.take_along_axis(rows, packing.reshape(*packing.shape, *(1,) * (rows.ndim - 2)), axis=1)


def packed_mask(
    mask: Bool[AnyArray, "b l"], packing: Int[AnyArray, "g t"], *, causal: bool = False
) -> Bool[Array, "g 1 t t"]:
    """Lets a query see the real tokens of its own row (all, where it has none); with `causal`, none that follow it.
    Rows `a b` and `c`, packed:

    ::

        1 1 0
        1 1 0      each row is a query,
        0 0 1      each column is a key
    """
    query, key = packing[:, :, None], packing[:, None, :]
    length, mask = mask.shape[1], jnp.asarray(mask)
    seen = mask | ~mask.any(axis=1, keepdims=True)
    visible = (query // length == key // length) & pack(seen, packing)[:, None, :]
    return (visible & (key <= query) if causal else visible)[:, None]


def packed_places(packing: Int[AnyArray, "g t"], batch: int, length: int) -> Int[Array, "b l"]:
    """Where in its group's T places each token of the rows stands; T where it was left out."""
    groups, count = packing.shape

    def one(places: jax.Array) -> jax.Array:
        return jnp.full(batch // groups * length, count, jnp.int32).at[places].set(jnp.arange(count, dtype=jnp.int32))

    return jax.vmap(one)(jnp.asarray(packing)).reshape(batch, length)


def run_packed(
    run: Callable[..., StackOutput],
    mask: Bool[AnyArray, "b l"] | None,
    packing: Int[AnyArray, "g t"],
    outputs_at: Int[AnyArray, "b k"] | None,
    *,
    causal: bool = False,
) -> StackOutput:
    """What a stack gives for rows: `run(mask, outputs_at=…)` is the stack on their packed tokens (`scan_layers`).

    Raises:
      ValueError: no mask of rows that fit the packing, or no `outputs_at`: real tokens, or the first of a row.
    """
    if mask is None or outputs_at is None:
        missing = "the mask of its rows" if mask is None else "the tokens to read, outputs_at,"
        raise ValueError(f"packing: expected {missing} beside it, found none")
    if len(mask) % len(packing):
        raise ValueError(f"packing: expected groups of equally many rows, found {len(packing)} of {len(mask)} rows")
    places = packed_places(packing, *mask.shape)
    at = jnp.take_along_axis(places, jnp.asarray(outputs_at), axis=1).reshape(len(packing), -1)
    output = run(packed_mask(mask, packing, causal=causal), outputs_at=at)
    return dataclasses.replace(output, hidden=output.hidden.reshape(*outputs_at.shape, -1))
