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
from jaxtyping import Array, Bool, Float, Int

from vlm.layers.arrays import AnyArray
from vlm.layers.transformer import StackOutput


def pack(x: AnyArray, packing: Int[AnyArray, "g t"]) -> Array:
    """The packed places of an array [B, L, …], as [G, T, …]."""
    rows = jnp.asarray(x).reshape(len(packing), -1, *x.shape[2:])
    return jnp.take_along_axis(rows, packing.reshape(*packing.shape, *(1,) * (rows.ndim - 2)), axis=1)


def packed_mask(
    mask: Bool[AnyArray, "b l"], packing: Int[AnyArray, "g t"], *, causal: bool = False
) -> Bool[Array, "g 1 t t"]:
    """Lets a query see the real tokens of its own row; with `causal`, none that follow it. Rows `a b` and `c`, packed:

    ::

        1 1 0
        1 1 0      each row is a query,
        0 0 1      each column is a key
    """
    query, key = packing[:, :, None], packing[:, None, :]
    length = mask.shape[1]
    visible = (query // length == key // length) & pack(mask, packing)[:, None, :]
    return (visible & (key <= query) if causal else visible)[:, None]


def packed_places(packing: Int[AnyArray, "g t"], batch: int, length: int) -> Int[Array, "b l"]:
    """Where in its group's T places each token of the rows stands; T where it was left out."""
    groups, count = packing.shape

    def one(places: jax.Array) -> jax.Array:
        return jnp.full(batch // groups * length, count, jnp.int32).at[places].set(jnp.arange(count, dtype=jnp.int32))

    return jax.vmap(one)(jnp.asarray(packing)).reshape(batch, length)


def unpack(hidden: Float[AnyArray, "g t e"], places: Int[AnyArray, "b l"]) -> Float[Array, "b l e"]:
    """The states of rows from those of their packed tokens; zeros where a token was left out."""
    groups = len(hidden)
    flat = jnp.asarray(places).reshape(groups, -1, 1)
    rows = jnp.take_along_axis(jnp.asarray(hidden), flat, axis=1, mode="fill", fill_value=0)
    return rows.reshape(*places.shape, -1)


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
      ValueError: no mask, or a request for the states or weights of all layers.
    """
    if mask is None:
        raise ValueError("packing: expected the mask of the rows beside it, found none")
    places = packed_places(packing, *mask.shape)
    at = None
    if outputs_at is not None:
        at = jnp.take_along_axis(places, jnp.asarray(outputs_at), axis=1).reshape(len(packing), -1)
    output = run(packed_mask(mask, packing, causal=causal), outputs_at=at)
    if output.hidden_states is not None or output.attentions is not None:
        raise ValueError("packing: expected neither hidden states nor attention weights of all layers beside it")
    if outputs_at is None:
        return dataclasses.replace(output, hidden=unpack(output.hidden, places))
    return dataclasses.replace(output, hidden=output.hidden.reshape(*outputs_at.shape, -1))
