"""Parameters laid out for decoding, and the stack that runs on them.

Training scans over stacked layers: one compiled layer, one array per weight. A decode step reads every weight for a
handful of tokens, so copying each layer out of its stack would double its cost, and many small products cost more than
one: for decoding every layer has its own arrays, the projections of self-attention are one kernel and so are the two
input products of a gated MLP. Kernels lie transposed, as CPUs read them for few rows: 10 to 45 % faster at 8 and 24.
`decoding_layout` makes that tree once, before the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.errors import UserError
from vlm.layers.arrays import AnyArray
from vlm.layers.linear import TRANSPOSED
from vlm.layers.transformer import LayerInput

SELF_ATTENTION = ("attention", "decoder_attention")
Params = dict[str, Any]


def decoding_layout(params: Mapping[str, Any], parts: Mapping[str, int]) -> Params:
    """The same parameters, their decoders laid out for decoding; a traceable function.

    Args:
      params: the tree as it is trained and stored.
      parts: the subtrees that decode ("decoder", "a/b"), each with the width of its attention heads.

    Returns:
      A tree in which each part's stack `layers` has become `layers_0`, `layers_1`, …; in them `query`, `key` and
      `value` of self-attention have become `qkv`, and `gate` and `up` of a gated MLP `gate_up`; every `kernel`
      [in, out] has become `transposed_kernel` [out, in].

    Raises:
      UserError: a part that the tree does not have.
    """
    tree = dict(params)
    for path, head_dim in parts.items():
        name, _, rest = path.partition("/")
        if name not in tree:
            raise UserError(f"params: expected {path!r}, found only {', '.join(tree)}")
        part = tree[name]
        tree[name] = decoding_layout(part, {rest: head_dim}) if rest else _unstack(part, head_dim)
    return tree


def _unstack(part: Mapping[str, Any], head_dim: int) -> Params:
    tree = {name: leaf for name, leaf in part.items() if name != "layers"}
    if "layers" not in part:
        raise UserError(f"params: expected stacked layers, found {', '.join(part)} (laid out for decoding already?)")
    stack = part["layers"]
    for i in range(len(jax.tree.leaves(stack)[0])):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        tree[f"layers_{i}"] = _transpose({name: _fuse(name, sub, head_dim) for name, sub in layer.items()})
    return tree


def _transpose(tree: Params) -> Params:
    changed = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            changed[name] = _transpose(value)
        else:
            changed |= {TRANSPOSED: value.T} if name == "kernel" and value.ndim == 2 else {name: value}
    return changed


def _fuse(name: str, sub: Any, head_dim: int) -> Any:
    if name in SELF_ATTENTION:
        return {**{k: v for k, v in sub.items() if k not in ("query", "key", "value")}, "qkv": _qkv(sub, head_dim)}
    if name == "mlp" and "gate" in sub:
        fused = {key: jnp.stack([sub["gate"][key], sub["up"][key]], axis=-2) for key in sub["gate"]}
        return {**{k: v for k, v in sub.items() if k not in ("gate", "up")}, "gate_up": fused}
    return sub


def _qkv(attention: Mapping[str, Any], head_dim: int) -> Params:
    """Kernel [in, K · (G + 2) · D] and bias: for each key/value head its G query heads, its key, its value."""

    def fuse(name: str) -> jax.Array:
        query, key, value = (attention[part][name] for part in ("query", "key", "value"))
        kv_heads = key.shape[-1] // head_dim
        lead = key.shape[:-1]
        heads = [x.reshape(*lead, kv_heads, -1, head_dim) for x in (query, key, value)]
        return jnp.concatenate(heads, axis=-2).reshape(*lead, -1)

    return {name: fuse(name) for name in attention["query"]}


def unstacked_layers(
    block: partial, num_layers: int, hidden: Float[AnyArray, "b l e"], *shared: Any, caches: Any = None, **flags: Any
) -> tuple[Float[Array, "b l e"], tuple[Any, ...]]:
    """Runs `layers_0` … one after another inside the calling module, each with its own cache.

    Args:
      block: as for `layers.transformer.scan_layers`, with its attention and MLP told that they are `fused`.
      shared: the block's further arguments.
      caches: one per layer, or None.

    Returns:
      The last hidden state and each layer's `LayerOutput.cache`.
    """
    outputs = []
    for i in range(num_layers):
        layer = LayerInput(cache=None if caches is None else caches[i])
        hidden, output = block(name=f"layers_{i}", **flags)(hidden, layer, *shared)
        outputs.append(output.cache)
    return jnp.asarray(hidden), tuple(outputs)
