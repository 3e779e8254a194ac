"""FLAVA's fusion encoder (Singh et al. 2022, section 3.1): a pre-norm transformer over image and text tokens together.

The tokens come projected, and nothing marks their position or modality here: the unimodal encoders did.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from vlm.encoders.output import EncoderOutput
from vlm.layers.arrays import AnyArray
from vlm.layers.linear import Linear, constrain, default_init, param
from vlm.layers.masks import padding_mask
from vlm.layers.mlp import Activation
from vlm.layers.norms import LayerNorm
from vlm.layers.transformer import Remat, TransformerBlock, check_stack, scan_layers
from vlm.strict import at_least


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Architecture; the defaults are the published FLAVA's.

    Attributes:
      class_token: a learned token in front, which stands for the pair.
      pooler: tanh(Linear(first token)) as `pooler_output`.
      init_std: of the layers' random kernels; small models need more than 0.02, about hidden_size**-0.5.
      remat, scan_unroll: see `layers.transformer.scan_layers`.
    """

    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    qkv_bias: bool = True
    class_token: bool = True
    pooler: bool = True
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    init_std: float = 0.02
    dtype: str = "float32"
    remat: Remat = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        check_stack(self)
        at_least(0, self, "init_std")


class FusionEncoder(nn.Module):
    """A class token and the tokens of all modalities through bidirectional layers."""

    config: FusionConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[AnyArray, "b n e"],
        mask: Bool[AnyArray, "b n"] | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        outputs_at: Int[AnyArray, "b k"] | None = None,
    ) -> EncoderOutput:
        """Encodes tokens; every output has one token more, the class token in front, if there is one.

        Args:
          mask: true at the tokens that others may attend to; None: all. The class token is always attended to.
          outputs_at: the outputs that are wanted, in place of all; the first is what is pooled.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        hidden = jnp.asarray(hidden, dtype)
        if config.class_token:
            token = param(self, "class_embedding", default_init, (config.hidden_size,), ("embed",))
            token = jnp.broadcast_to(token.astype(dtype), (len(hidden), 1, config.hidden_size))
            hidden = jnp.concatenate([token, hidden], axis=1)
            mask = None if mask is None else jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        init = nn.initializers.normal(config.init_std)
        block = partial(
            TransformerBlock,
            num_heads=config.num_heads,
            head_dim=config.hidden_size // config.num_heads,
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            norm_eps=config.norm_eps,
            qkv_bias=config.qkv_bias,
            dropout_rate=config.dropout_rate,
            attention_dropout_rate=config.attention_dropout_rate,
            **dict.fromkeys(("qkv_init", "out_init", "up_init", "down_init"), init),
            dtype=dtype,
        )
        flags: dict[str, Any] = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        output = scan_layers(
            block,
            config.num_layers,
            constrain(hidden, "batch", "length", "embed_activation"),
            None if mask is None else padding_mask(mask),
            remat=config.remat,
            unroll=config.scan_unroll,
            deterministic=deterministic,
            outputs_at=outputs_at,
            **flags,
        )
        hidden = LayerNorm(config.norm_eps, dtype, name="output_norm")(output.hidden)
        pooled = None
        if config.pooler:
            project = Linear(config.hidden_size, ("embed", "projection"), dtype=dtype, name="pooler")
            pooled = jnp.tanh(project(hidden[:, 0]))
        return EncoderOutput(hidden, pooled, output.hidden_states, output.attentions, pre_norm_state=output.hidden)
