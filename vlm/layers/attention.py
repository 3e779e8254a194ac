"""Multi-head attention: one function for the arithmetic, one module for the projections around it.

Used by every encoder and decoder: grouped key/value heads, boolean masks, rotary positions, key and value caches,
query/key normalisation, attention over another sequence. The softmax runs in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm.layers.arrays import AnyArray, exact, on_one_cpu
from vlm.layers.cache import Cache
from vlm.layers.linear import Initializer, Linear, constrain, default_init
from vlm.layers.norms import LayerNorm, RMSNorm
from vlm.layers.positions import apply_rotary

Mask = Bool[AnyArray, "#b #h #l m"] | None
KeysValues = tuple[Float[Array, "b m k d"], Float[Array, "b m k d"]]


BLOCKED_SCORES = 2**15
"""Numbers: from so many scores per example on, the gradients of one example at a time are worth a loop on a CPU …"""
BLOCKED_FORWARD = 2**19
"""… and from so many on the values: its caches cannot hold the scores of a few examples at once."""
LONG_CONTEXT = 128
"""Tokens: the keys and values of so many, for decoding, are computed one example at a time on a CPU."""


def attention_kernel(
    backend: str, dtype: Any, head_dim: int, *, masked: bool, scores: int, devices: int
) -> Literal["cudnn", "xla", "late", "blocked"]:
    """Names the formulation that `dot_product_attention` uses, for `scores` = H · L · M numbers per example.

    * "late" on CPUs and in float32: the softmax is normalised after the product with the values, on [L, D] instead of
      [L, M] numbers; products are exact;
    * "blocked" on one CPU unless scores are few: the same, with gradients (and, of many scores, values) computed one
      example after another, so that they stay in the cache, from scores computed again instead of kept;
    * "cudnn" on NVIDIA GPUs in half precision without a mask (its masked backward pass wants lengths of 64·n);
    * "xla" everywhere else.
    """
    if backend == "cpu" and devices == 1 and scores >= BLOCKED_SCORES:
        return "blocked"
    if backend == "cpu" or jnp.dtype(dtype) == jnp.float32:
        return "late"
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return "cudnn" if backend == "gpu" and half and not masked and head_dim % 8 == 0 and head_dim <= 128 else "xla"


def dot_product_attention(
    query: Float[AnyArray, "b l h d"],
    key: Float[AnyArray, "b m k d"],
    value: Float[AnyArray, "b m k d"],
    mask: Mask = None,
) -> Float[Array, "b l h d"]:
    """softmax(q kᵀ / √D) v with the fastest formulation for the device.

    Rows whose mask hides every key attend uniformly (as PyTorch's additive masks do); they are finite.
    """
    kernel = attention_kernel(
        jax.default_backend(),
        query.dtype,
        query.shape[-1],
        masked=mask is not None,
        scores=query.shape[1] * query.shape[2] * key.shape[1],
        devices=max(1, jax.sharding.get_abstract_mesh().size),
    )
    if kernel == "late":
        return _late(query, key, value, mask)
    if kernel == "blocked":
        return _blocked(query, key, value, mask)
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation="cudnn" if kernel == "cudnn" else "xla"
    )


def _late(query: AnyArray, key: AnyArray, value: AnyArray, mask: Mask) -> jax.Array:
    """exp(scores) v, then divided by the sum of exp(scores)."""
    return _attend(query, jnp.asarray(key).transpose(0, 2, 1, 3), jnp.asarray(value).transpose(0, 2, 1, 3), mask)


@jax.custom_vjp
def _blocked(query: AnyArray, key: AnyArray, value: AnyArray, mask: Mask) -> jax.Array:
    """`_late`, whose gradients (and values, where scores are many) are computed in a loop over the examples."""
    if query.shape[1] * query.shape[2] * key.shape[1] < BLOCKED_FORWARD:
        return _late(query, key, value, mask)
    return jax.lax.map(lambda rows: _one(*rows), (query, key, value, _for_each(query, mask)))


def _blocked_forward(query: Any, key: Any, value: Any, mask: Any) -> tuple[jax.Array, Any]:
    return _blocked(query, key, value, mask), (query, key, value, mask)


def _blocked_backward(kept: Any, g: jax.Array) -> tuple[Any, ...]:
    def example(rows: Any) -> Any:
        query, key, value, mask, g = rows
        return jax.vjp(lambda query, key, value: _one(query, key, value, mask), query, key, value)[1](g)

    query, key, value, mask = kept
    return *jax.lax.map(example, (query, key, value, _for_each(query, mask), g)), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _one(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any) -> jax.Array:
    """`_late` of one example."""
    return _late(*jax.tree.map(lambda x: x[None], (query, key, value, mask)))[0]


def _for_each(query: AnyArray, mask: Mask) -> Mask:
    return None if mask is None else jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))


def attention_weights(
    query: Float[AnyArray, "b l h d"], key: Float[AnyArray, "b m k d"], mask: Mask = None
) -> Float[Array, "b h l m"]:
    """The normalised attention weights themselves, float32: for outputs, visualisation and attention dropout."""
    scores = _scores(_grouped(query, key.shape[2]), jnp.asarray(key).transpose(0, 2, 1, 3), mask, query.shape[2])
    return jax.nn.softmax(scores, axis=-1)


def cached_attention(query: Float[AnyArray, "b l h d"], cache: Cache, mask: Mask = None) -> Float[Array, "b l h d"]:
    """softmax(q kᵀ / √D) v against a cache, in the layout in which the cache keeps its keys and values.

    The rows that decode one example together are its L queries, so that its keys are read once for all of them.
    """
    return _attend(query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), mask)


def _attend(
    query: Float[AnyArray, "b l h d"],
    key: Float[AnyArray, "b k m d"],
    value: Float[AnyArray, "b k m d"],
    mask: Mask,
) -> Float[Array, "b l h d"]:
    """exp(scores) v, then divided by the sum of exp(scores)."""
    batch, length, heads, width = query.shape
    scores = _scores(_grouped(query, key.shape[1]), key, mask, heads)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    weights = weights.reshape(batch, key.shape[1], -1, weights.shape[-1]).astype(value.dtype)
    mixed = jnp.einsum("bkrm,bkmd->bkrd", weights, value, precision=exact(value))
    return (mixed.reshape(batch, heads, length, width) / total.astype(mixed.dtype)).transpose(0, 2, 1, 3)


def _grouped(query: Float[AnyArray, "b l h d"], kv_heads: int) -> Float[Array, "b k r d"]:
    """Scaled queries; the heads that share a key/value head and their L queries are one axis."""
    batch, _, _, width = query.shape
    return (jnp.asarray(query) * width**-0.5).transpose(0, 2, 1, 3).reshape(batch, kv_heads, -1, width)


def _scores(
    grouped: Float[Array, "b k r d"], key: Float[AnyArray, "b k m d"], mask: Mask, heads: int
) -> Float[Array, "b h l m"]:
    """Masked scores in float32."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=exact(grouped, key))
    scores = product("bkrd,bkmd->bkrm", grouped, key).reshape(len(grouped), heads, -1, key.shape[2])
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


class Attention(nn.Module):
    """Projects to queries, keys and values, attends, projects back.

    Attributes:
      num_heads, num_kv_heads: query heads H and key/value heads K (K divides H; None: K = H).
      head_dim: width D of one head; H·D need not equal the hidden width.
      qk_norm: normalises queries and keys per head before rotary positions ("layer" or "rms").
      fused: the parameters are laid out for decoding (`layers.layout`): one kernel for queries, keys and values. A
        context is then read into a cache, which is returned.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: Literal["layer", "rms"] | None = None
    norm_eps: float = 1e-5
    dropout_rate: float = 0.0
    qkv_init: Initializer = default_init
    out_init: Initializer = default_init
    out_features: int | None = None
    dtype: Any = jnp.float32
    fused: bool = False

    def _project(self, name: str, x: AnyArray, heads: int) -> Float[Array, "b l h d"]:
        axes = ("embed", "heads" if name == "query" else "kv_heads")
        width = heads * self.head_dim
        y = Linear(width, axes, self.qkv_bias, self.qkv_init, dtype=self.dtype, name=name)(x)
        y = constrain(y, "batch", "length", "heads_activation")
        return y.reshape(*y.shape[:2], heads, self.head_dim)

    def _project_fused(self, x: AnyArray) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values in one product; each key/value head's columns lie beside its query heads'."""
        kv_heads = self.num_kv_heads or self.num_heads
        groups = self.num_heads // kv_heads
        width = kv_heads * (groups + 2) * self.head_dim
        y = Linear(width, ("embed", "heads"), self.qkv_bias, self.qkv_init, dtype=self.dtype, name="qkv")(x)
        y = constrain(y, "batch", "length", "heads_activation")
        y = y.reshape(*y.shape[:2], kv_heads, groups + 2, self.head_dim)
        query = y[..., :groups, :].reshape(*y.shape[:2], self.num_heads, self.head_dim)
        return query, y[..., groups, :], y[..., groups + 1, :]

    def _read(self, context: AnyArray) -> Cache:
        """The keys and values of a context, which do not change while decoding.

        One CPU computes those of a long context one example at a time, so that they lie in its cache when they are laid
        out by heads; the compiler would copy those of all examples three times.
        """

        def of(module: Attention, rows: AnyArray) -> Cache:
            heads = self.num_kv_heads or self.num_heads
            return Cache.constant(
                *(module._normalise(name, module._project(name, rows, heads)) for name in ("key", "value"))
            )

        if not on_one_cpu() or context.shape[1] < LONG_CONTEXT or self.is_initializing():
            return of(self, context)
        scan: Any = nn.scan(
            lambda module, carry, rows: (carry, of(module, rows)),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        _, found = scan(self, None, jnp.asarray(context)[:, None])
        return jax.tree.map(lambda x: x[:, 0], found)

    def _normalise(self, name: str, x: jax.Array) -> jax.Array:
        if self.qk_norm is None or name == "value":
            return x
        norm = LayerNorm if self.qk_norm == "layer" else RMSNorm
        return norm(self.norm_eps, self.dtype, name=f"{name}_norm")(x)

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "b l e"],
        mask: Mask = None,
        *,
        context: Float[AnyArray, "b m c"] | None = None,
        keys_values: KeysValues | None = None,
        rotary: tuple[Float[Array, "b l d"], Float[Array, "b l d"]] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        offset: Float[AnyArray, "b h l m"] | None = None,
    ) -> tuple[Float[Array, "b l e"], KeysValues | Cache, Float[Array, "b h l m"] | None]:
        """Attends from `x` to itself, to `context`, or to already projected `keys_values`.

        With a growing `cache`, the new keys and values take its next slots and `mask` spans the whole buffer
        (`DecoderCache.begin`); a constant one is only read. `offset` is added to the attention weights, without a
        cache: a gradient with respect to it is one with respect to them. Returns the output, the keys and values (the
        updated cache where one was given) and, without a cache, the attention weights if asked for.
        """
        kv_heads = self.num_kv_heads or self.num_heads
        if self.fused and context is not None and cache is None:
            if output_attentions or offset is not None:
                raise ValueError("attention: while decoding, expected neither output_attentions nor an offset")
            cache = self._read(context)
        constant = cache is not None and cache.index is None
        fused = (
            self._project_fused(x) if self.fused and context is None and keys_values is None and not constant else None
        )
        query = self._normalise("query", self._project("query", x, self.num_heads) if fused is None else fused[0])
        if rotary is not None:
            query = apply_rotary(query, rotary)
        if keys_values is None and not constant:
            source = x if context is None else context
            key = self._normalise("key", self._project("key", source, kv_heads) if fused is None else fused[1])
            if rotary is not None:
                key = apply_rotary(key, rotary)
            keys_values = (key, self._project("value", source, kv_heads) if fused is None else fused[2])
        if cache is None:
            assert keys_values is not None
            state: KeysValues | Cache = keys_values
            mixed, weights = self._attend(query, keys_values, mask, deterministic, output_attentions, offset)
        else:
            state = cache if keys_values is None else cache.append(*keys_values)
            mixed, weights = cached_attention(query, state, mask), None
        mixed = mixed.reshape(*mixed.shape[:2], self.num_heads * self.head_dim)
        features = self.out_features or x.shape[-1]
        out = Linear(features, ("heads", "embed"), self.out_bias, self.out_init, dtype=self.dtype, name="out")
        return out(mixed), state, weights

    def _attend(
        self,
        query: jax.Array,
        keys_values: KeysValues,
        mask: Mask,
        deterministic: bool,
        output_attentions: bool,
        offset: Any,
    ) -> tuple[jax.Array, jax.Array | None]:
        key, value = keys_values
        dropout = self.dropout_rate > 0 and not deterministic
        if not dropout and not output_attentions and offset is None:
            return dot_product_attention(query, key, value, mask), None
        weights = attention_weights(query, key, mask)
        dropped = nn.Dropout(self.dropout_rate, name="dropout")(weights, deterministic=not dropout)
        dropped = dropped if offset is None else dropped + offset
        groups = query.shape[2] // key.shape[2]
        value = value if groups == 1 else jnp.repeat(value, groups, axis=2)
        mixed = jnp.einsum("bhlm,bmhd->blhd", dropped.astype(value.dtype), value, precision=exact(value))
        return mixed, weights if output_attentions else None
