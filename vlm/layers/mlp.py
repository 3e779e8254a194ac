"""Feed-forward layers and their activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.layers.linear import Initializer, Linear, constrain, default_init


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with: x · σ(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """down(activation(up(x))): the transformer's two-layer feed-forward network."""

    mlp_dim: int
    activation: str
    use_bias: bool = True
    up_init: Initializer = default_init
    down_init: Initializer = default_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        linear = partial(Linear, use_bias=self.use_bias, dtype=self.dtype)
        hidden = linear(self.mlp_dim, axes=("embed", "mlp"), kernel_init=self.up_init, name="up")(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp_activation")
        return linear(x.shape[-1], axes=("mlp", "embed"), kernel_init=self.down_init, name="down")(hidden)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) · up(x)): SwiGLU with the "silu" activation (Shazeer 2020)."""

    mlp_dim: int
    activation: str = "silu"
    use_bias: bool = False
    kernel_init: Initializer = default_init
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
        linear = partial(Linear, use_bias=self.use_bias, kernel_init=self.kernel_init, dtype=self.dtype)
        gate = linear(self.mlp_dim, axes=("embed", "mlp"), name="gate")(x)
        hidden = ACTIVATIONS[self.activation](gate) * linear(self.mlp_dim, axes=("embed", "mlp"), name="up")(x)
        if hidden.ndim == 3:
            hidden = constrain(hidden, "batch", "length", "mlp_activation")
        return linear(x.shape[-1], axes=("mlp", "embed"), name="down")(hidden)
