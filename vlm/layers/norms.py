"""Normalisation layers, always computed in float32.

The mean is subtracted before squaring: the one-pass variance E[x²] − E[x]² loses digits on shifted inputs and fails
for the tiny epsilons (1e-12) of BERT-style models.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.layers.arrays import AnyArray, along_last
from vlm.layers.linear import param


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016): (x − mean) / √(var + eps) · scale + bias."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b e"]) -> Float[Array, "*b e"]:
        scale = param(self, "scale", nn.initializers.ones_init(), x.shape[-1:], ("norm",))
        bias = param(self, "bias", nn.initializers.zeros_init(), x.shape[-1:], ("norm",))
        centred = jnp.asarray(x, jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        scale, bias = along_last(scale, centred), along_last(bias, centred)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019): x / √(mean(x²) + eps) · scale."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b e"]) -> Float[Array, "*b e"]:
        scale = param(self, "scale", nn.initializers.ones_init(), x.shape[-1:], ("norm",))
        x = jnp.asarray(x, jnp.float32)
        scaled = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * along_last(scale, x)
        return scaled.astype(self.dtype)


def normalise(x: Float[AnyArray, "*b d"], eps: float = 1e-12) -> Float[Array, "*b d"]:
    """Unit vectors x / max(‖x‖, eps), in float32; zero stays zero, with a finite gradient."""
    x = jnp.asarray(x, jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), eps**2))
