"""MED, the mixture of encoder and decoder of BLIP (Li et al. 2022, arXiv 2201.12086): one BERT, three uses.

A layer is self-attention, cross-attention to another sequence (image tokens), MLP, each normalised after its residual.

=================  ==============  ===============  =================
use                self-attention  cross-attention  first token
=================  ==============  ===============  =================
text encoder       bidirectional   left out         [CLS]
grounded encoder   bidirectional   to the context   [ENC] (or [CLS])
decoder            causal          to the context   [DEC]
=================  ==============  ===============  =================
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
from vlm.layers.attention import Attention, Mask
from vlm.layers.cache import Cache, DecoderCache
from vlm.layers.layout import unstacked_layers
from vlm.layers.linear import Embedding, Linear, constrain
from vlm.layers.masks import causal_mask, padding_mask
from vlm.layers.mlp import MLP, Activation
from vlm.layers.norms import LayerNorm
from vlm.layers.positions import padded_positions
from vlm.layers.transformer import LayerInput, LayerOutput, Remat, StackOutput, check_stack, scan_layers
from vlm.strict import at_least

Fuse = Literal["average", "merge"]


@dataclasses.dataclass(frozen=True)
class MedConfig:
    """Architecture of one text stack; the defaults are the published BLIP's, for ViT-B and ViT-L alike.

    Attributes:
      context_size: width of what cross-attention reads (the image encoder's; for VQA's decoder the text encoder's);
        None: there is no cross-attention (BERT).
      init_std: of the layers' random kernels; small models need more than BERT's 0.02, about hidden_size**-0.5, or what
        they read is lost beside the residual stream.
      pooler: tanh(Linear(first token)) as `pooler_output` instead of the first token itself (HF's BlipModel only).
      remat, scan_unroll: see `layers.transformer.scan_layers`.
    """

    vocab_size: int = 30524
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_length: int = 512
    context_size: int | None = 768
    pad_id: int = 0
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    init_std: float = 0.02
    pooler: bool = False
    dtype: str = "float32"
    remat: Remat = "none"
    scan_unroll: int = 1

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.hidden_size // self.num_heads

    def __post_init__(self) -> None:
        check_stack(self, "vocab_size", "max_length", "context_size")
        at_least(0, self, "pad_id", "init_std")


class MedLayer(nn.Module):
    """One post-norm layer. `init` creates all its parameters, whichever mode it runs in.

    Attributes:
      shared_decoder: the layer has a second self-attention, for use as decoder; all else serves both.
      causal: it is used as decoder now.
      fuse: how the branches of two contexts become one: their "average" or a Linear map of both ("merge").
      fused: the parameters are laid out for decoding (`layers.layout`). The layer then takes and gives a pair of
        caches, self-attention's and cross-attention's; without caches it gives self-attention's keys and values, and
        the cache of its context.
    """

    config: MedConfig
    shared_decoder: bool = False
    causal: bool = False
    fuse: Fuse | None = None
    fused: bool = False
    deterministic: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False

    @nn.compact
    def __call__(
        self,
        hidden: Float[AnyArray, "b l e"],
        layer: LayerInput,
        mask: Mask = None,
        context: Float[AnyArray, "b ... n c"] | None = None,
        context_mask: Bool[AnyArray, "b ... n"] | None = None,
        offset: Float[AnyArray, "b h l n"] | None = None,
    ) -> tuple[Float[Array, "b l e"], LayerOutput]:
        """`offset` is added to the cross-attention's weights, for gradients with respect to them."""
        caches = layer.cache or (None, None)
        hidden = constrain(jnp.asarray(hidden), "batch", "length", "embed_activation")
        names = ["attention", "decoder_attention"] if self.shared_decoder else ["attention"]
        used = names.pop(-1 if self.causal else 0)
        if self.is_initializing():
            for name in names:
                self._self_attention(name, hidden, mask, None)
            if context is None and self.config.context_size is not None:
                context = jnp.zeros((len(hidden), *((2,) if self.fuse else ()), 1, self.config.context_size))
        hidden, own, weights = self._self_attention(used, hidden, mask, caches[0])
        cross_weights = cross = None
        if context is not None or caches[1] is not None:
            hidden, cross, cross_weights = self._cross_attention(hidden, context, context_mask, caches[1], offset)
        config, dtype = self.config, hidden.dtype
        inits = (nn.initializers.normal(config.init_std),) * 2
        branch = MLP(config.mlp_dim, config.activation, True, *inits, dtype=dtype, name="mlp")(hidden)
        hidden = self._add("mlp_norm", hidden, branch)
        states = hidden if self.output_hidden_states else None
        return hidden, LayerOutput(states, weights, cross_weights, (own, cross) if self.fused else None)

    def _self_attention(
        self, name: str, hidden: jax.Array, mask: Mask, cache: Cache | None
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        branch, state, weights = self._attention(name, self.fused)(
            hidden, mask, cache=cache, deterministic=self.deterministic, output_attentions=self.output_attentions
        )
        return self._add(f"{name}_norm", hidden, branch), state, weights

    def _cross_attention(
        self, hidden: jax.Array, context: Any, context_mask: Any, cache: Cache | None, offset: Any
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """Reads the context, or two of them; the weights of two are stacked on an axis after the batch."""

        def read(name: str, context: Any, mask: Any) -> tuple[jax.Array, Any, jax.Array | None]:
            return self._attention(name, self.fused)(
                hidden,
                None if mask is None else padding_mask(mask),
                context=context,
                cache=cache,
                deterministic=self.deterministic,
                output_attentions=self.output_attentions,
                offset=offset,
            )

        if self.fuse is None:
            branch, state, weights = read("cross_attention", context, context_mask)
            return self._add("cross_attention_norm", hidden, branch), state, weights
        branches, _, pair = zip(
            *(
                read(f"cross_attention_{i}", context[:, i], None if context_mask is None else context_mask[:, i])
                for i in range(2)
            ),
            strict=True,
        )
        if self.fuse == "merge":
            merge = Linear(hidden.shape[-1], ("embed", "projection"), dtype=hidden.dtype, name="merge")
            branch = merge(jnp.concatenate(branches, axis=-1))
        else:
            branch = (branches[0] + branches[1]) / 2
        weights = jnp.stack(pair, axis=1) if self.output_attentions else None
        return self._add("cross_attention_norm", hidden, branch), None, weights

    def _attention(self, name: str, fused: bool = False) -> Attention:
        config, init = self.config, nn.initializers.normal(self.config.init_std)
        return Attention(
            config.num_heads,
            config.head_dim,
            qkv_init=init,
            out_init=init,
            dropout_rate=config.attention_dropout_rate,
            dtype=jnp.dtype(config.dtype),
            fused=fused,
            name=name,
        )

    def _add(self, norm: str, hidden: jax.Array, branch: jax.Array) -> jax.Array:
        config = self.config
        branch = nn.Dropout(config.dropout_rate)(branch, deterministic=self.deterministic)
        return LayerNorm(config.norm_eps, jnp.dtype(config.dtype), name=norm)(hidden + branch)


class Med(nn.Module):
    """Token and position embeddings (no segments) through MED layers.

    Attributes:
      shared_decoder: the stack is also the decoder, with a second self-attention in every layer and all else shared.
      average_layers: None for one context. With two (NLVR2), this many layers ("average_layers") average what they
        read from each; the rest ("merge_layers") map the concatenation.
      decoding: the parameters are laid out for decoding (`layers.layout`); for `prefill` and `decode` only.
    """

    config: MedConfig
    shared_decoder: bool = False
    average_layers: int | None = None
    decoding: bool = False

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        axes = ("position", "embed")
        self.position_embedding = Embedding(config.max_length, config.hidden_size, axes, dtype=dtype)
        self.embedding_norm = LayerNorm(config.norm_eps, dtype)
        self.embedding_dropout = nn.Dropout(config.dropout_rate)
        if config.pooler:
            self.pooler = Linear(config.hidden_size, ("embed", "projection"), dtype=dtype)

    def __call__(
        self,
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"] | None = None,
        *,
        context: Float[AnyArray, "b ... m c"] | None = None,
        context_mask: Bool[AnyArray, "b ... m"] | None = None,
        causal: bool = False,
        positions: Int[AnyArray, "b l"] | None = None,
        deterministic: bool = True,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """Runs the stack as text encoder, grounded encoder (with `context`) or decoder (`causal`).

        Args:
          mask: true at real tokens.
          context: what cross-attention reads, [B, M, C], or [B, 2, M, C] where the stack reads two sequences; without
            it the cross-attention is left out.
          context_mask: [B, M] or [B, 2, M], true where the context may be read.
          positions: in place of 0 … L - 1, which count padding on the left as well.

        Raises:
          ValueError: a sequence longer than the position table, or a context of another width or rank.
        """
        self._check(tokens, context)
        positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        hidden = self.embedding_dropout(self._embed(tokens, positions), deterministic=deterministic)
        visible = None if mask is None else padding_mask(mask)
        if causal:
            future = causal_mask(tokens.shape[1])
            visible = future if visible is None else future & visible
        output = self._layers(
            constrain(hidden, "batch", "length", "embed_activation"),
            (visible, context, context_mask),
            causal,
            deterministic=deterministic,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        pooled = output.hidden[:, 0]
        pooled = jnp.tanh(self.pooler(pooled)) if self.config.pooler else pooled
        return EncoderOutput(output.hidden, pooled, output.hidden_states, output.attentions, output.cross_attentions)

    def prefill(
        self,
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"],
        context: Float[AnyArray, "b m c"],
        context_mask: Bool[AnyArray, "b m"] | None = None,
    ) -> tuple[Float[Array, "b l e"], DecoderCache]:
        """Runs a prompt, padded on either side; the context's keys and values are computed here, once."""
        self._check(tokens, context)
        visible = causal_mask(tokens.shape[1]) & padding_mask(mask)
        hidden = self._embed(tokens, padded_positions(mask))
        hidden, states = self._unstacked(hidden, (visible, context, context_mask))
        constants = {"cross": tuple(cross for _, cross in states), "mask": context_mask}
        return hidden, DecoderCache.of_prompt(tuple(own for own, _ in states), jnp.asarray(mask), constants)

    def decode(self, tokens: Int[AnyArray, "b n"], cache: DecoderCache) -> tuple[Float[Array, "b n e"], DecoderCache]:
        """Runs the next token of the n rows of each example."""
        following, visible, positions = cache.begin()
        caches = tuple(zip(cache.layers, cache.constants["cross"], strict=True))
        shared = (visible, None, cache.constants["mask"])
        hidden, states = self._unstacked(self._embed(tokens, positions), shared, caches)
        return hidden, dataclasses.replace(following, layers=tuple(own for own, _ in states))

    @nn.compact
    def _unstacked(self, hidden: jax.Array, shared: tuple[Any, ...], caches: Any = None) -> tuple[jax.Array, Any]:
        config = self.config
        block = partial(MedLayer, config=config, shared_decoder=self.shared_decoder, causal=True, fused=True)
        hidden = constrain(hidden, "batch", "length", "embed_activation")
        return unstacked_layers(block, config.num_layers, hidden, *shared, caches=caches)

    def _embed(self, tokens: Any, positions: Any) -> jax.Array:
        return self.embedding_norm(self.token_embedding(tokens) + self.position_embedding(positions))

    def _check(self, tokens: Any, context: Any) -> None:
        config = self.config
        if tokens.shape[1] > config.max_length:
            raise ValueError(f"tokens: expected at most {config.max_length} per row, found {tokens.shape[1]}")
        if context is None:
            return
        lead = (tokens.shape[0],) if self.average_layers is None else (tokens.shape[0], 2)
        if config.context_size is None:
            raise ValueError("context: this stack has no cross-attention (context_size is None)")
        if context.shape != (*lead, context.shape[-2], config.context_size):
            form = ", ".join(map(str, (*lead, "M", config.context_size)))
            raise ValueError(f"context: expected [{form}], found {list(context.shape)}")

    @nn.compact
    def _layers(self, hidden: jax.Array, shared: tuple[Any, ...], causal: bool, **flags: Any) -> StackOutput:
        config = self.config

        def stack(
            name: str, num_layers: int, hidden: jax.Array, fuse: Literal["average", "merge"] | None
        ) -> StackOutput:
            block = partial(MedLayer, config=config, shared_decoder=self.shared_decoder, causal=causal, fuse=fuse)
            options: dict[str, Any] = {"remat": config.remat, "unroll": config.scan_unroll, "name": name}
            return scan_layers(block, num_layers, hidden, *shared, **options, **flags)

        if self.average_layers is None:
            return stack("layers", config.num_layers, hidden, None)
        outputs: list[StackOutput] = []
        merged = config.num_layers - self.average_layers
        parts: tuple[tuple[Fuse, int], ...] = (("average", self.average_layers), ("merge", merged))
        for fuse, num_layers in parts:
            if num_layers:
                outputs.append(stack(f"{fuse}_layers", num_layers, hidden, fuse))
                hidden = outputs[-1].hidden
        return _join(outputs)


def _join(outputs: list[StackOutput]) -> StackOutput:
    """The output of stacks that ran one after another; the input of a later one is the last state before it."""

    def joined(name: str) -> jax.Array | None:
        parts = [getattr(output, name) for output in outputs]
        if parts[0] is None:
            return None
        if name == "hidden_states":
            parts[1:] = [part[1:] for part in parts[1:]]
        return jnp.concatenate(parts)

    names = ("hidden_states", "attentions", "cross_attentions")
    return StackOutput(outputs[-1].hidden, *(joined(name) for name in names))
