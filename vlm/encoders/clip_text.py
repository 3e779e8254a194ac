"""CLIP's text encoder (Radford et al. 2021): a causal pre-norm transformer read at the end-of-text token.

AltCLIP's teacher; also any CLIP text tower on its own.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Int

from vlm.encoders.output import EncoderOutput
from vlm.layers.arrays import AnyArray
from vlm.layers.linear import Embedding, constrain
from vlm.layers.masks import causal_mask, padding_mask
from vlm.layers.mlp import Activation
from vlm.layers.norms import LayerNorm
from vlm.layers.packing import pack, run_packed
from vlm.layers.transformer import Remat, TransformerBlock, check_stack, scan_layers, select

normal = nn.initializers.normal


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Architecture of a CLIP text tower; the defaults are ViT-L/14's.

    Attributes:
      eos_id: the end-of-text token; the state at its first occurrence is the pooled output.
      remat, scan_unroll: see `layers.transformer.scan_layers`.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 77
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    eos_id: int = 49407
    dtype: str = "float32"
    remat: Remat = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        check_stack(self, "vocab_size", "max_length")


class ClipText(nn.Module):
    """Tokens and positions through causal layers, a final norm, the end-of-text state."""

    config: ClipTextConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"] | None = None,
        *,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        pooled_only: bool = False,
        packing: Int[AnyArray, "g t"] | None = None,
    ) -> EncoderOutput:
        """Encodes tokens; `pooler_output` [B, E] is the normed state at the end-of-text token, before the projection.

        With `pooled_only`, the last layer computes nothing else: `last_hidden_state` is [B, 1, E]. With `packing`
        beside it, the rows of `mask` are computed packed (`layers.packing`).

        Raises:
          ValueError: more tokens than positions.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        length = tokens.shape[1]
        if length > config.max_length:
            raise ValueError(f"tokens: expected at most {config.max_length} per row, found {length}")
        end = jnp.argmax(tokens == config.eos_id, axis=1)[:, None]
        positions = jnp.arange(length)[None]
        if packing is not None:
            tokens, positions = pack(tokens, packing), packing % length
        table = partial(Embedding, features=config.hidden_size, dtype=dtype)
        hidden = table(config.vocab_size, name="token_embedding")(tokens)
        hidden = hidden + table(config.max_length, axes=("position", "embed"), name="position_embedding")(positions)
        hidden = constrain(hidden, "batch", "length", "embed_activation")
        width, depth = config.hidden_size, config.num_layers
        residual = normal(width**-0.5 * (2 * depth) ** -0.5)
        block = partial(
            TransformerBlock,
            num_heads=config.num_heads,
            head_dim=width // config.num_heads,
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            norm_eps=config.norm_eps,
            qkv_init=residual,
            out_init=normal(width**-0.5),
            up_init=normal((2 * width) ** -0.5),
            down_init=residual,
            dtype=dtype,
        )
        flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        flags |= {"remat": config.remat, "unroll": config.scan_unroll, "deterministic": deterministic}
        run = partial(scan_layers, block, depth, hidden, **flags)
        read = end if pooled_only else None
        if packing is None:
            visible = causal_mask(length) if mask is None else causal_mask(length) & padding_mask(mask)
            output = run(visible, outputs_at=read)
        else:
            output = run_packed(run, mask, packing, read, causal=True)
        hidden = LayerNorm(config.norm_eps, dtype, name="output_norm")(output.hidden)
        pooled = hidden[:, 0] if pooled_only else select(hidden, end)[:, 0]
        return EncoderOutput(hidden, pooled, output.hidden_states, output.attentions)
