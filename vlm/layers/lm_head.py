"""The language-modelling head of BERT-style models (Devlin et al. 2019)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm.layers.arrays import AnyArray, along_last, exact
from vlm.layers.linear import Linear, default_init, param, transposed_matmul
from vlm.layers.mlp import ACTIVATIONS, Activation
from vlm.layers.norms import LayerNorm


class LMHead(nn.Module):
    """Dense, activation, norm; then the transposed token embedding and a bias.

    Attributes:
      tied: False gives the head its own output kernel [E, V] in place of the token embedding.
    """

    vocab_size: int
    norm_eps: float
    activation: Activation = "gelu"
    tied: bool = True
    dtype: Any = "float32"

    @nn.compact
    def __call__(
        self, hidden: Float[AnyArray, "*b e"], embedding: Float[AnyArray, "v e"] | None = None
    ) -> Float[Array, "*b v"]:
        dtype, width = jnp.dtype(self.dtype), hidden.shape[-1]
        hidden = Linear(width, ("embed", "projection"), dtype=dtype, name="dense")(hidden)
        hidden = LayerNorm(self.norm_eps, dtype, name="norm")(ACTIVATIONS[self.activation](hidden))
        bias = param(self, "bias", nn.initializers.zeros_init(), (self.vocab_size,), ("vocab",)).astype(dtype)
        if self.tied:
            assert embedding is not None, "a tied head needs the token embedding"
            logits = transposed_matmul(hidden, embedding.astype(dtype))
            return logits + along_last(bias, logits)
        kernel = param(self, "kernel", default_init, (width, self.vocab_size), ("embed", "vocab"))
        logits = jnp.dot(hidden, kernel.astype(dtype), precision=exact(hidden))
        return logits + along_last(bias, logits)
