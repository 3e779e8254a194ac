"""The transformer block and the scanned stack of blocks that every encoder and decoder is made of."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.layers.arrays import AnyArray, on_one_cpu
from vlm.layers.attention import Attention, Mask
from vlm.layers.cache import Cache
from vlm.layers.linear import Initializer, constrain, default_init
from vlm.layers.mlp import MLP, Activation, GatedMLP
from vlm.layers.norms import LayerNorm, RMSNorm
from vlm.strict import at_least

Remat = Literal["none", "dots", "full"]
SIZES = ("hidden_size", "num_layers", "num_heads", "mlp_dim", "scan_unroll")
RATES = ("dropout_rate", "attention_dropout_rate", "drop_path_rate")


def check_stack(config: Any, *sizes: str) -> None:
    """For the `__post_init__` of a stack's configuration: sizes (with `sizes`), widths of heads, rates.

    Raises:
      ValueError: naming the field, what was expected and what was found.
    """
    at_least(1, config, *SIZES, *sizes)
    at_least(0, config, "norm_eps")
    if config.hidden_size % config.num_heads:
        expected = f"expected a multiple of num_heads={config.num_heads}"
        raise ValueError(f"hidden_size: {expected}, found {config.hidden_size}")
    for name in RATES:
        if not 0 <= getattr(config, name, 0.0) < 1:
            raise ValueError(f"{name}: expected a rate from 0 to below 1, found {getattr(config, name)}")


@flax.struct.dataclass
class LayerInput:
    """What differs from layer to layer of a stack: the stochastic-depth rate and the cache (any tree of arrays)."""

    drop_path_rate: jax.Array | None = None
    cache: Any = None


@flax.struct.dataclass
class LayerOutput:
    """What a layer gives beside its hidden state; a stack stacks these on a leading layer axis."""

    hidden: jax.Array | None = None
    attention: jax.Array | None = None
    cross_attention: jax.Array | None = None
    cache: Any = None


class TransformerBlock(nn.Module):
    """Self-attention and MLP with residual connections, normalised before (pre-norm) or after (post-norm) each.

    pre-norm:  x ← x + attention(norm(x));  x ← x + mlp(norm(x))        (ViT, CLIP, LLaMA)
    post-norm: x ← norm(x + attention(x));  x ← norm(x + mlp(x))        (BERT, RoBERTa)

    With `fused`, the parameters are laid out for decoding (`layers.layout`), and the output's cache holds the keys and
    values where no cache was given.
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
    activation: Activation
    norm_eps: float
    pre_norm: bool = True
    norm: Literal["layer", "rms"] = "layer"
    gated_mlp: bool = False
    num_kv_heads: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    qkv_init: Initializer = default_init
    out_init: Initializer = default_init
    up_init: Initializer = default_init
    down_init: Initializer = default_init
    dtype: Any = jnp.float32
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
        rotary: tuple[Float[Array, "b l d"], Float[Array, "b l d"]] | None = None,
        *,
        outputs_at: Int[AnyArray, "b k"] | None = None,
    ) -> tuple[Float[Array, "b n e"], LayerOutput]:
        """One layer; the signature is what `jax.lax.scan` carries, scans over and broadcasts.

        Only the tokens at `outputs_at` are computed where given; they read all others. (Not with rotary positions.)
        """
        norm = partial(LayerNorm if self.norm == "layer" else RMSNorm, self.norm_eps, self.dtype)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        hidden = constrain(jnp.asarray(hidden), "batch", "length", "embed_activation")

        normed = attention_norm(hidden) if self.pre_norm else hidden
        query, context = normed, None
        if outputs_at is not None:
            if rotary is not None or layer.cache is not None:
                raise ValueError("outputs_at: expected neither rotary positions nor a cache beside it")
            context = constrain(normed, "batch", "length", "embed_activation")
            query, hidden = select(normed, outputs_at), select(hidden, outputs_at)
            mask = None if mask is None else select_rows(mask, outputs_at)
        branch, state, weights = self._attention()(
            query,
            mask,
            context=context,
            rotary=rotary,
            cache=layer.cache,
            deterministic=self.deterministic,
            output_attentions=self.output_attentions,
        )
        hidden = hidden + self._drop(branch, layer)
        hidden = hidden if self.pre_norm else attention_norm(hidden)

        branch = self._mlp()(mlp_norm(hidden) if self.pre_norm else hidden)
        hidden = hidden + self._drop(branch, layer)
        hidden = hidden if self.pre_norm else mlp_norm(hidden)
        hidden = constrain(hidden, "batch", "length", "embed_activation")
        return hidden, LayerOutput(
            hidden=hidden if self.output_hidden_states else None,
            attention=weights,
            cache=state if self.fused or isinstance(state, Cache) else None,
        )

    def _attention(self) -> Attention:
        return Attention(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            dropout_rate=self.attention_dropout_rate,
            qkv_init=self.qkv_init,
            out_init=self.out_init,
            dtype=self.dtype,
            fused=self.fused,
            name="attention",
        )

    def _mlp(self) -> MLP | GatedMLP:
        if self.gated_mlp:
            options = (self.mlp_bias, self.up_init, self.dtype, self.fused)
            return GatedMLP(self.mlp_dim, self.activation, *options, name="mlp")
        inits = (self.up_init, self.down_init)
        return MLP(self.mlp_dim, self.activation, self.mlp_bias, *inits, dtype=self.dtype, name="mlp")

    def _drop(self, branch: jax.Array, layer: LayerInput) -> jax.Array:
        """Dropout, then stochastic depth (Huang et al. 2016): the branch of a whole example is skipped."""
        if self.deterministic:
            return branch
        if self.dropout_rate:
            branch = nn.Dropout(self.dropout_rate, deterministic=False)(branch)
        if layer.drop_path_rate is not None:
            keep = 1.0 - layer.drop_path_rate
            shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
            branch = jnp.where(kept, branch / keep.astype(branch.dtype), jnp.zeros((), branch.dtype))
        return branch


def select(hidden: Float[AnyArray, "b l e"], positions: Int[AnyArray, "b k"]) -> Float[Array, "b k e"]:
    """The tokens at `positions` of each row."""
    positions = constrain(jnp.asarray(positions), "batch", "length")
    tokens = jnp.take_along_axis(jnp.asarray(hidden), positions[:, :, None], axis=1)
    return constrain(tokens, "batch", "length", "embed_activation")


def first_tokens(rows: AnyArray) -> Int[Array, "b 1"]:
    """The position of every row's first token, for `outputs_at`."""
    return jnp.zeros((len(rows), 1), jnp.int32)


def select_rows(mask: Bool[AnyArray, "#b #h #l m"], positions: Int[AnyArray, "b k"]) -> Bool[Array, "#b #h n m"]:
    """The rows of an attention mask that belong to the tokens at `positions`."""
    if mask.shape[2] == 1:
        return jnp.asarray(mask)
    mask = jnp.broadcast_to(mask, (len(positions), *mask.shape[1:]))
    return jnp.take_along_axis(mask, jnp.asarray(positions)[:, None, :, None], axis=2)


@flax.struct.dataclass
class StackOutput:
    """Last hidden state [B, L, E], or [B, K, E] with `outputs_at`; on request hidden_states [layers + 1, B, L, E] (the
    first is the stack's input), attentions [layers, B, H, L, M] and, of blocks that read a context, cross_attentions;
    the updated cache where one was given.
    """

    hidden: jax.Array
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None
    cross_attentions: jax.Array | None = None
    cache: Any = None


def scan_layers(
    block: partial,
    num_layers: int,
    hidden: Float[AnyArray, "b l e"],
    *shared: Any,
    cache: Any = None,
    drop_path_rate: float = 0.0,
    remat: Remat = "none",
    unroll: int = 1,
    deterministic: bool = True,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    outputs_at: Int[AnyArray, "b k"] | None = None,
    name: str = "layers",
) -> StackOutput:
    """Runs `num_layers` equal blocks inside the calling module: one compiled block, scanned (with `outputs_at` a second
    one for the last layer); the parameters are stacked on a leading "layers" axis.

    Args:
      block: a partial of the block's class; its keywords configure every layer.
      shared: the block's further arguments, the same for every layer: mask, rotary tables, a context and its mask.
      cache: stacked on the layer axis.
      drop_path_rate: stochastic depth, growing linearly from 0 in the first layer to this rate in the last.
      remat: what the backward pass computes again: nothing ("none"), all but matrix products ("dots"), or all ("full").
      unroll: layers per iteration of the scan; more trades compile time for fewer copies of the stacked weights.
      outputs_at: the positions whose last states the caller reads. The last layer computes these alone, and `hidden`
        of the result is [B, K, E]: a twelve-layer encoder of which only the class token is read saves 7 %. Training
        then holds a copy of the other layers' parameters, and of their gradients.
      name: path of the stacked parameters.

    Raises:
      ValueError: `outputs_at` beside a request for the states or weights of all layers, or beside a cache.
    """
    if outputs_at is not None and (output_hidden_states or output_attentions or cache is not None):
        raise ValueError("outputs_at: expected neither hidden states, attention weights nor a cache beside it")
    rates = jnp.linspace(0.0, drop_path_rate, num_layers) if drop_path_rate and not deterministic else None
    scan: Any = nn.scan  # its annotation knows a single axis only
    layers = scan(
        _rematerialised(block.func, remat),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast for _ in shared)),
        length=num_layers,
        unroll=min(unroll, num_layers),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(
        **block.keywords,
        deterministic=deterministic,
        output_hidden_states=output_hidden_states,
        output_attentions=output_attentions,
        name=name,
    )
    plain = cache is None and not (output_hidden_states or output_attentions or layers.is_initializing())
    groups = _groups(hidden) if plain and deterministic else 1
    if groups > 1 or (outputs_at is not None and not layers.is_initializing()):
        run = partial(_run_layers, layers, block, rates, remat=remat, unroll=unroll)
        return StackOutput(_in_groups(run, groups, jnp.asarray(hidden), outputs_at, shared))
    first = hidden
    hidden, outputs = layers(hidden, LayerInput(rates, cache), *shared)
    if outputs_at is not None:
        hidden = select(hidden, outputs_at)
    states = outputs.hidden
    if states is not None:
        states = jnp.concatenate([first[None].astype(states.dtype), states])
    return StackOutput(jnp.asarray(hidden), states, outputs.attention, outputs.cross_attention, outputs.cache)


CACHE_BYTES = 2**25
"""How much of a layer's widest activations a CPU's last-level cache holds."""


def _groups(hidden: AnyArray) -> int:
    """How many groups of examples one CPU encodes in turn, so that a layer's activations stay in its cache."""
    batch, length, width = hidden.shape
    most = CACHE_BYTES // (16 * length * width)  # examples; a feed-forward layer is four times as wide, in float32
    size = next((size for size in range(min(batch, most), 0, -1) if batch % size == 0), 1)
    return batch // size if on_one_cpu() and batch > most and 2 * size > most else 1  # few are slower than too many


def _in_groups(run: Any, groups: int, hidden: jax.Array, outputs_at: Any, shared: tuple[Any, ...]) -> jax.Array:
    """`run` on equal groups of examples in turn; what has a row for each example is cut like `hidden`."""
    if groups == 1:
        return run(hidden, outputs_at, *shared)
    batch = len(hidden)
    leaves, tree = jax.tree.flatten((hidden, outputs_at, *shared))
    cut = {i: x.reshape(groups, -1, *x.shape[1:]) for i, x in enumerate(leaves) if len(x) == batch}

    def one(rows: Any) -> jax.Array:
        return run(*jax.tree.unflatten(tree, [rows.get(i, x) for i, x in enumerate(leaves)]))

    found = jax.lax.map(one, cut)
    return found.reshape(batch, *found.shape[2:])


def _run_layers(
    layers: Any,
    block: partial,
    rates: jax.Array | None,
    hidden: jax.Array,
    outputs_at: Any,
    *shared: Any,
    remat: Remat,
    unroll: int,
) -> jax.Array:
    """What `layers` make of `hidden`, at the positions `outputs_at` only if given, from the stacked parameters.

    All layers but the last are then scanned. For training the stacks are cut in two by one `split` each, whose
    derivative is one concatenation; otherwise each layer is taken from the whole stack, which copies nothing.
    """
    stacked = nn.unbox(layers.variables["params"])
    depth = len(jax.tree.leaves(stacked)[0])
    module = _rematerialised(block.func, remat)(**block.keywords, deterministic=layers.deterministic, parent=None)
    keys = jax.random.split(layers.make_rng("dropout"), depth) if layers.has_rng("dropout") else None
    per_layer = (stacked, LayerInput(rates), keys)

    def run(hidden: Any, layer: Any, **more: Any) -> tuple[Any, None]:
        params, inputs, key = layer
        rngs = {} if key is None else {"dropout": key}
        return module.apply({"params": params}, hidden, inputs, *shared, rngs=rngs, **more)[0], None

    if outputs_at is None:
        return jax.lax.scan(run, hidden, per_layer, unroll=min(unroll, depth))[0]
    if layers.deterministic:

        def take(i: Any) -> Any:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), per_layer)

        hidden, _ = jax.lax.scan(lambda hidden, i: run(hidden, take(i)), hidden, jnp.arange(depth - 1))
        return run(hidden, take(depth - 1), outputs_at=outputs_at)[0]
    halves = jax.tree.map(lambda x: jax.lax.split(x, (depth - 1, 1)), per_layer)
    scanned, last = (jax.tree.map(lambda parts, i=i: parts[i], halves, is_leaf=_is_split) for i in (0, 1))
    hidden, _ = jax.lax.scan(run, hidden, scanned, unroll=min(unroll, max(1, depth - 1)))
    return run(hidden, jax.tree.map(lambda x: x[0], last), outputs_at=outputs_at)[0]


def _is_split(x: Any) -> bool:
    return isinstance(x, list)


def _rematerialised(block: Any, remat: Remat) -> Any:
    if remat == "none":
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return nn.remat(block, policy=policy, prevent_cse=False)
