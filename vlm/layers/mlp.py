"""Feed-forward layers and their activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.layers.arrays import AnyArray, exact
from vlm.layers.linear import Initializer, Linear, constrain, default_init, param


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU's approximation by tanh (Hendrycks & Gimpel 2016), in float32 whatever `x` is."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """GELU itself, x · Φ(x), by the error function as in PyTorch; half the time of jax's form with erfc on CPU.

    In float32 whatever `x` is: 1 + erf cancels for negative numbers.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with: x · σ(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def _elementwise(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function`, of which the backward pass keeps only the arguments.

    Its factors are the widest arrays of a layer and cheap to compute again: a CLIP training step keeps 15 % less.
    """
    return jax.checkpoint(function, prevent_cse=False)(*arrays)  # layers are scanned: nothing to merge it with


class MLP(nn.Module):
    """down(activation(up(x))): the transformer's two-layer feed-forward network."""

    mlp_dim: int
    activation: Activation
    use_bias: bool = True
    up_init: Initializer = default_init
    down_init: Initializer = default_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b e"]) -> Float[Array, "*b e"]:
        linear = partial(Linear, use_bias=self.use_bias, dtype=self.dtype)
        hidden = linear(self.mlp_dim, axes=("embed", "mlp"), kernel_init=self.up_init, name="up")(x)
        hidden = _elementwise(ACTIVATIONS[self.activation], hidden)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp_activation")
        return linear(x.shape[-1], axes=("mlp", "embed"), kernel_init=self.down_init, name="down")(hidden)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU with the "silu" activation (Shazeer 2020).

    Attributes:
      fused: the parameters are laid out for decoding (`layers.layout`): gate and up in one kernel [in, 2, mlp_dim].
    """

    mlp_dim: int
    activation: Activation = "silu"
    use_bias: bool = False
    kernel_init: Initializer = default_init
    dtype: Any = jnp.float32
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b e"]) -> Float[Array, "*b e"]:
        linear = partial(Linear, use_bias=self.use_bias, kernel_init=self.kernel_init, dtype=self.dtype)
        if self.fused:
            gate, up = GateUp(self.mlp_dim, self.use_bias, self.dtype, name="gate_up")(x)
        else:
            gate, up = (linear(self.mlp_dim, axes=("embed", "mlp"), name=name)(x) for name in ("gate", "up"))
        hidden = _elementwise(lambda gate, up: ACTIVATIONS[self.activation](gate) * up, gate, up)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp_activation")
        return linear(x.shape[-1], axes=("mlp", "embed"), name="down")(hidden)


class GateUp(nn.Module):
    """Both input products of a gated MLP in one; parameters kernel [in, 2, mlp_dim] and bias [2, mlp_dim]."""

    mlp_dim: int
    use_bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b e"]) -> tuple[Float[Array, "*b m"], Float[Array, "*b m"]]:
        shape = (x.shape[-1], 2, self.mlp_dim)
        kernel = param(self, "kernel", default_init, shape, ("embed", None, "mlp"))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = jnp.einsum("...e,ecm->...cm", x, kernel, precision=exact(x, kernel))
        if self.use_bias:
            bias = param(self, "bias", nn.initializers.zeros_init(), shape[1:], (None, "mlp")).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 2) + bias.shape)
        return y[..., 0, :], y[..., 1, :]
