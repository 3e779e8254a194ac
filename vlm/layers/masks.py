"""Attention masks: booleans, true where a query (row) may look at a key (column).

Every mask broadcasts to [B, H, L, M]; combine masks with `&`. `None` means that everything is visible.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool

from vlm.layers.arrays import AnyArray


def padding_mask(mask: Bool[AnyArray, "b m"]) -> Bool[Array, "b 1 1 m"]:
    """Hides padded keys from every query. With tokens `a b c _`:

    ::

        1 1 1 0      each row is a query,
        1 1 1 0      each column is a key
    """
    return jnp.asarray(mask)[:, None, None, :]


def causal_mask(query_length: int, key_length: int | None = None) -> Bool[Array, "1 1 l m"]:
    """Lets a query see itself and earlier keys; the last query is aligned with the last key.

    ::

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    key_length = key_length or query_length
    rows = jnp.arange(query_length)[:, None] + (key_length - query_length)
    return (jnp.arange(key_length)[None, :] <= rows)[None, None]
