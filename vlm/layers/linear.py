"""Linear maps and embedding tables: the only place where initialisers meet logical axis names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import RulesFallback
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from vlm.layers.arrays import AnyArray, along_last, exact, on_one_cpu

Initializer = Callable[..., Any]
Dtype = Any

default_init = nn.initializers.normal(0.02)

TRANSPOSED = "transposed_kernel"
"""Name of a kernel [out, in] in parameters laid out for decoding (`layers.layout`), in place of "kernel" [in, out]."""


def param(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Creates a float32 parameter of `module` and names the logical axis of each of its dimensions."""
    return jnp.asarray(module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))


def partitioned(value: jax.Array, *axes: str | None) -> Any:
    """Boxes an array that is no parameter (a queue) with the logical axis of each of its dimensions."""
    return nn.LogicallyPartitioned(value, names=axes)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to lay `x` out along logical `axes` (`None`: not split). A no-op without a mesh.

    A dimension that its mesh axes do not divide stays whole, as in a weight.

    Raises:
      ValueError: an axis without a rule, or a mesh axis that two dimensions are split over.
    """
    rules, sizes = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
    if not rules:
        return x

    def fits(size: int, axis: str | None) -> bool:
        return size % math.prod(sizes.get(name, 1) for name in _mesh_axes(rules, axis)) == 0

    kept = tuple(axis if fits(size, axis) else None for size, axis in zip(x.shape, axes, strict=True))
    return cast(jax.Array, nn.with_logical_constraint(x, kept, fallback=RulesFallback.RAISE_ERROR))


def _mesh_axes(rules: dict[str, Any], axis: str | None) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over."""
    names = rules.get(axis or "") or ()
    return (names,) if isinstance(names, str) else tuple(names)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of x [..., I] and kernel [I, O].

    Only its derivative differs from `jnp.dot`'s: the kernel's gradient is one product that yields [I, O] as it is
    stored. Autodiff's own yields its transpose, for which CPUs copy the activations and run at half the speed.
    """
    return jnp.dot(x, kernel, precision=exact(x, kernel))


def _matmul_forward(x: Any, kernel: Any) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array | None]]:
    """Keeps what the gradients of the differentiated operands need: a frozen kernel's input is not kept."""
    kept = (_columns(x.value, kernel.value) if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return jnp.dot(x.value, kernel.value, precision=exact(x.value, kernel.value)), kept


def _matmul_backward(kept: tuple[jax.Array | None, jax.Array | None], g: Any) -> tuple[Any, Any]:
    x, kernel = kept
    if isinstance(g, SymbolicZero):
        return None, None
    rows = tuple(range(g.ndim - 1))
    product = partial(jax.lax.dot_general, precision=exact(g))
    into_x = None if kernel is None else product(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    if x is None:
        return into_x, None
    if x.shape[:-1] != g.shape[:-1]:  # kept by `_columns`
        return into_x, product(
            x.transpose(0, 2, 1).reshape(-1, x.shape[1]), g.reshape(-1, g.shape[-1]), (((1,), (0,)), ((), ()))
        )
    return into_x, product(x, g, ((rows, rows), ((), ())))


def _columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` [..., I] as it is kept for its kernel's gradient: wide ones on one CPU as columns [I / 16, rows, 16].

    The product with the gradient reads it transposed. Rows that lie multiples of 4 kB apart share a few lines of the
    caches, and turning 3072 columns takes five times as long as turning 192 blocks of 16.
    """
    width = x.shape[-1]
    if not on_one_cpu() or x.ndim < 2 or width < _WIDE or width % _BLOCK or width <= kernel.shape[1]:
        return x  # what several kernels read (queries, keys, values) is kept once, as it is
    return x.reshape(-1, width // _BLOCK, _BLOCK).transpose(1, 0, 2)


_WIDE, _BLOCK = 2048, 16


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


FEW_ROWS = 64
"""So many rows at most are multiplied from the right, on CPUs."""


def transposed_matmul(x: Float[AnyArray, "*b i"], kernel: Float[AnyArray, "o i"]) -> Float[Array, "*b o"]:
    """The product of x [..., I] and the transpose of a kernel [O, I].

    For the few rows of a decoding step CPUs compute kernel · xᵀ, and read the kernel as it lies: 1.8 times as fast at
    8 rows, 1.2 at 24. The barrier keeps the compiler from turning the product around again.
    """
    rows = jnp.asarray(x).reshape(-1, x.shape[-1])
    product = partial(jnp.dot, precision=exact(rows, kernel))
    if jax.default_backend() == "cpu" and len(rows) <= FEW_ROWS:
        y = jax.lax.optimization_barrier(product(kernel, rows.T)).T
    else:
        y = product(rows, kernel.T)
    return y.reshape(*x.shape[:-1], -1)


class Linear(nn.Module):
    """`x @ kernel + bias` on the last axis, with a 2-D kernel [in, out] whatever the caller reshapes it to.

    Attributes:
      features: width of the output.
      axes: logical names of the kernel's input and output axis.
      dtype: dtype of the computation; parameters stay in float32 and are cast where they are used.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    kernel_init: Initializer = default_init
    bias_init: Initializer = nn.initializers.zeros_init()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b i"]) -> Float[Array, "*b o"]:
        x = jnp.asarray(x, self.dtype)
        if self.has_variable("params", TRANSPOSED):
            y = transposed_matmul(x, jnp.asarray(self.get_variable("params", TRANSPOSED), self.dtype))
        else:
            kernel = param(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
            y = matmul(x, kernel.astype(self.dtype))
        if self.use_bias:
            bias = param(self, "bias", self.bias_init, (self.features,), self.axes[1:])
            y = y + along_last(bias.astype(self.dtype), y)
        return y


class Embedding(nn.Module):
    """A table of vectors, looked up by integer id; `attend` multiplies with its transpose (tied output layer).

    Attributes:
      pad_id: the row of padding: it starts at zero, and looking it up gives it no gradient (PyTorch's padding_idx).
    """

    num_embeddings: int
    features: int
    axes: tuple[str | None, str] = ("vocab", "embed")
    embedding_init: Initializer = default_init
    dtype: Dtype = jnp.float32
    pad_id: int | None = None

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self.embedding = param(self, "embedding", self._init, shape, self.axes)

    def __call__(self, ids: Int[AnyArray, "*b"]) -> Float[Array, "*b e"]:
        rows = self._look_up(jnp.asarray(ids))
        if self.pad_id is None:
            return rows
        return jnp.where(jnp.expand_dims(ids == self.pad_id, -1), jax.lax.stop_gradient(rows), rows)

    def attend(self, hidden: Float[AnyArray, "*b e"]) -> Float[Array, "*b v"]:
        """Scores `hidden` against every row of the table."""
        return transposed_matmul(hidden.astype(self.dtype), self.embedding.astype(self.dtype))

    def _look_up(self, ids: Int[Array, "*b"]) -> Float[Array, "*b e"]:
        """Rows of the table, wherever it lives, on the devices of the ids.

        Where the mesh axes that split the features split the batch, too (fsdp), every device gets the whole of a table
        that is smaller than its rows; rows of a larger one are looked up where their features are, by all devices that
        share them, and then change hands in one all-to-all. Left alone, the compiler may give every device the rows of
        the whole batch, forwards or backwards ("involuntary full rematerialization").
        """
        rules, sizes = dict(nn.get_logical_axis_rules()), jax.sharding.get_abstract_mesh().shape
        features = _mesh_axes(rules, self.axes[1])
        here = tuple(name for name in _mesh_axes(rules, "batch") if name not in features)
        inner = (None,) * (ids.ndim - 1)
        if not rules or not sizes or ids.ndim < 2:
            return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)
        batch, width = (math.prod(sizes[name] for name in names) for names in (here, features))
        if ids.shape[0] % batch:
            here, batch = (), 1
        if self.num_embeddings <= ids.size // (batch * width) or self.features % width:
            rows = jnp.take(constrain(self.embedding, self.axes[0], None), ids, axis=0).astype(self.dtype)
        else:
            rows = jnp.take(self.embedding, ids, axis=0).astype(self.dtype)
            rows = jax.lax.with_sharding_constraint(rows, jax.sharding.PartitionSpec(here, *inner, features))
        return constrain(rows, "batch", *inner, "embed_activation")

    def _init(self, *arguments: Any) -> jax.Array:
        table = self.embedding_init(*arguments)
        return table if self.pad_id is None else table.at[self.pad_id].set(0.0)
