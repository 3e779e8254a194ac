"""BERT-style text encoder (Devlin et al. 2019; RoBERTa, Liu et al. 2019; XLM-R, Conneau et al. 2020).

Post-norm like the originals or pre-norm (FLAVA); absolute positions or RoBERTa's padding-aware ones.
Used by AltCLIP (XLM-R and the BERT student) and FLAVA.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.encoders.output import EncoderOutput
from vlm.layers.arrays import AnyArray
from vlm.layers.linear import Embedding, Linear, constrain
from vlm.layers.masks import padding_mask
from vlm.layers.mlp import Activation
from vlm.layers.norms import LayerNorm
from vlm.layers.packing import pack, run_packed
from vlm.layers.positions import roberta_positions
from vlm.layers.transformer import Remat, StackOutput, TransformerBlock, check_stack, scan_layers
from vlm.strict import at_least


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT-style encoder; the defaults are XLM-R large's.

    Attributes:
      max_length: rows of the position table (XLM-R: 514, of which two are never used by real tokens).
      positions: "roberta" counts real tokens from pad_id + 1; "absolute" counts columns from 0.
      pre_norm: normalise before each sub-layer and once after the last (FLAVA) instead of after each (BERT).
      pooler: tanh(Linear(first token)) as `pooler_output`.
      init_std: of the layers' random kernels; small models need more than BERT's 0.02, about hidden_size**-0.5.
      remat, scan_unroll: see `layers.transformer.scan_layers`.
    """

    vocab_size: int = 250002
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    max_length: int = 514
    type_vocab_size: int = 1
    pad_id: int = 1
    positions: Literal["absolute", "roberta"] = "roberta"
    pre_norm: bool = False
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    pooler: bool = False
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    init_std: float = 0.02
    dtype: str = "float32"
    remat: Remat = "none"
    scan_unroll: int = 1

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def max_tokens(self) -> int:
        """Longest sequence that the position table allows."""
        return self.max_length - (self.pad_id + 1 if self.positions == "roberta" else 0)

    def __post_init__(self) -> None:
        check_stack(self, "vocab_size", "max_tokens", "type_vocab_size")
        at_least(0, self, "pad_id", "init_std")


class Bert(nn.Module):
    """Token, position and segment embeddings through bidirectional transformer layers."""

    config: BertConfig

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, pad_id=config.pad_id)
        table = partial(Embedding, features=config.hidden_size, axes=("position", "embed"), dtype=dtype)
        self.position_embedding = table(config.max_length)
        self.token_type_embedding = table(config.type_vocab_size)
        self.embedding_norm = LayerNorm(config.norm_eps, dtype)
        self.embedding_dropout = nn.Dropout(config.dropout_rate)
        if config.pre_norm:
            self.output_norm = LayerNorm(config.norm_eps, dtype)
        if config.pooler:
            self.pooler = Linear(config.hidden_size, ("embed", "projection"), dtype=dtype)

    def __call__(
        self,
        tokens: Int[AnyArray, "b l"] | None = None,
        mask: Bool[AnyArray, "b l"] | None = None,
        *,
        token_embeds: Float[AnyArray, "b l e"] | None = None,
        positions: Int[AnyArray, "b l"] | None = None,
        token_types: Int[AnyArray, "b l"] | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        outputs_at: Int[AnyArray, "b k"] | None = None,
        packing: Int[AnyArray, "g t"] | None = None,
    ) -> EncoderOutput:
        """Encodes tokens, or `token_embeds` in their place.

        Args:
          mask: true at real tokens; without it padding is attended to (its positions are still the padding's).
          positions, token_types: override the derived position ids and the all-zero segments.
          outputs_at: the tokens whose last states are wanted, in place of all; the first is what is pooled.
          packing: computes the rows of `mask` packed (`layers.packing`), for `outputs_at` at real or first tokens.

        Raises:
          ValueError: neither or both of tokens and token_embeds, or a sequence longer than the position table.
        """
        config = self.config
        hidden = self._embed(tokens, token_embeds, positions, token_types, packing)
        hidden = self.embedding_dropout(self.embedding_norm(hidden), deterministic=deterministic)
        hidden = constrain(hidden, "batch", "length", "embed_activation")
        flags = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        run = partial(self._layers, hidden, deterministic=deterministic, **flags)
        if packing is None:
            output = run(None if mask is None else padding_mask(mask), outputs_at=outputs_at)
        else:
            output = run_packed(run, mask, packing, outputs_at)
        states = output.hidden
        hidden = self.output_norm(states) if config.pre_norm else states
        pooled = jnp.tanh(self.pooler(hidden[:, 0])) if config.pooler else None
        states = states if config.pre_norm else None
        return EncoderOutput(hidden, pooled, output.hidden_states, output.attentions, pre_norm_state=states)

    @nn.compact
    def _layers(self, hidden: jax.Array, mask: jax.Array | None, **flags: Any) -> StackOutput:
        config, init = self.config, nn.initializers.normal(self.config.init_std)
        block = partial(
            TransformerBlock,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            activation=config.activation,
            norm_eps=config.norm_eps,
            pre_norm=config.pre_norm,
            qkv_bias=config.qkv_bias,
            dropout_rate=config.dropout_rate,
            attention_dropout_rate=config.attention_dropout_rate,
            **dict.fromkeys(("qkv_init", "out_init", "up_init", "down_init"), init),
            dtype=jnp.dtype(config.dtype),
        )
        return scan_layers(
            block, config.num_layers, hidden, mask, remat=config.remat, unroll=config.scan_unroll, **flags
        )

    def _embed(self, tokens, token_embeds, positions, token_types, packing) -> Float[Array, "b l e"]:
        config = self.config
        if (tokens is None) == (token_embeds is None):
            raise ValueError("text: expected exactly one of tokens and token_embeds")
        batch, length = (token_embeds if tokens is None else tokens).shape[:2]
        if length > config.max_tokens:
            raise ValueError(f"tokens: expected at most {config.max_tokens} per row, found {length}")
        if positions is None:
            if config.positions == "roberta" and tokens is not None:
                positions = roberta_positions(tokens, config.pad_id)
            else:
                first = config.pad_id + 1 if config.positions == "roberta" else 0
                positions = jnp.broadcast_to(jnp.arange(length)[None] + first, (batch, length))
        if token_types is None:
            token_types = jnp.zeros((batch, length), jnp.int32)
        placed: Any = jnp.asarray if packing is None else partial(pack, packing=packing)
        embeds = self.token_embedding(placed(tokens)) if token_embeds is None else placed(token_embeds)
        return embeds + self.token_type_embedding(placed(token_types)) + self.position_embedding(placed(positions))
