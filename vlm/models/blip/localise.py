"""Where in an image a text is found: Grad-CAM on the grounded encoder's attention (Selvaraju et al. 2017).

The matching head says how well text and image fit; the map of a token is its cross-attention to the image's patches
times the positive part of that logit's gradient with respect to it, averaged over the heads (Li et al. 2021, ALBEF;
BLIP as LAVIS shows it, layer 7 of 12 counted from 0).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.errors import UserError
from vlm.fusion.med import MedConfig, MedLayer
from vlm.layers.arrays import AnyArray, along_last
from vlm.layers.attention import Attention, attention_weights
from vlm.layers.masks import padding_mask
from vlm.layers.mlp import MLP
from vlm.layers.norms import LayerNorm
from vlm.layers.transformer import LayerInput


@flax.struct.dataclass
class Attended:
    """Cross-attention [B, H, L, M] of one layer, the gradient of the logit "matched" with respect to it, and the
    matching logits [B, 2].
    """

    weights: jax.Array
    gradient: jax.Array
    logits: jax.Array


@flax.struct.dataclass
class Maps:
    """Maps over the image's patches, [B, …, rows, columns], not normalised.

    Attributes:
      tokens: of each of the L tokens, zero at padding; the first is [ENC]'s (or [CLS]'s).
      average: mean over the tokens of the text itself.
      logits: the matching logits [B, 2].
    """

    tokens: jax.Array
    average: jax.Array
    logits: jax.Array


def default_layer(num_layers: int) -> int:
    """Layer 7 of 12, and what corresponds to it in other stacks."""
    return num_layers * 7 // 12


def localise(
    model: Any,
    params: Any,
    image: Float[AnyArray, "b h w 3"],
    tokens: Int[AnyArray, "b l"],
    mask: Bool[AnyArray, "b l"],
    layer: int | None = None,
) -> Maps:
    """Maps of every token of each text in its image.

    Args:
      model: a BLIP with a matching head; layer: whose cross-attention, counted from 0.

    Raises:
      UserError: a model without matching head or of several images, or no such layer.
    """
    config = model.config
    if config.text is None or not config.itm or config.num_images != 1 or config.video != "none":
        raise UserError("localise: expected a model of single images with a matching head (retrieval, pretraining)")
    count = config.text.num_layers
    layer = default_layer(count) if layer is None else layer
    if not 0 <= layer < count:
        raise UserError(f"layer: expected a number from 0 to {count - 1}, found {layer}")
    found = attended(model, params, jnp.asarray(image), jnp.asarray(tokens), jnp.asarray(mask), layer)
    maps = (found.weights * jax.nn.relu(found.gradient)).mean(axis=1)[..., 1:] * jnp.asarray(mask)[..., None]
    height, width = (size // config.vision.patch_size for size in image.shape[1:3])
    assert height * width == maps.shape[-1]
    maps = maps.reshape(*maps.shape[:2], height, width)
    places = jnp.arange(mask.shape[1])[None]
    own = (places > 0) & (places < mask.sum(axis=1, keepdims=True) - 1)  # neither [ENC] nor [SEP]
    average = jnp.einsum("blhw,bl->bhw", maps, own) / jnp.maximum(own.sum(axis=1), 1)[:, None, None]
    return Maps(maps, average, found.logits)


@partial(jax.jit, static_argnames=("model", "layer"))
def attended(model: Any, params: Any, image: jax.Array, tokens: jax.Array, mask: jax.Array, layer: int) -> Attended:
    """One layer's cross-attention and its gradient; that layer and those after it run one by one."""
    config, variables = model.config, {"params": params}
    states = model.apply(variables, image, method="encode_image_states").last_hidden_state
    read = model.apply(variables, tokens, mask, states, output_hidden_states=True, method="encode_multimodal")
    start, visible = read.hidden_states[layer], padding_mask(mask)

    def layer_params(number: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[number], params["text"]["layers"])

    def score(offset: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, weights = _layer(config.text, layer_params(layer), start, visible, states, offset)
        block = MedLayer(config.text, config.shared_decoder)
        for number in range(layer + 1, config.text.num_layers):
            one = {"params": layer_params(number)}
            hidden, _ = block.apply(one, hidden, LayerInput(), visible, states)  # pyright: ignore
        logits = model.apply(variables, hidden[:, 0], method=lambda module, x: module.itm_head(x))
        return logits[:, 1].sum(), (weights, logits)

    shape = (len(tokens), config.text.num_heads, tokens.shape[1], states.shape[1])
    gradient, (weights, logits) = jax.grad(score, has_aux=True)(jnp.zeros(shape, states.dtype))
    return Attended(weights, gradient, logits)


def _layer(
    config: MedConfig, params: Any, hidden: jax.Array, visible: jax.Array, context: jax.Array, offset: jax.Array
) -> tuple[Float[Array, "b l e"], Float[Array, "b h l m"]]:
    """`MedLayer` with something added to its cross-attention, which it also returns."""
    dtype, heads = jnp.dtype(config.dtype), config.num_heads

    def norm(name: str, x: jax.Array) -> jax.Array:
        return LayerNorm(config.norm_eps, dtype).apply({"params": params[name]}, x)  # pyright: ignore

    def linear(name: str, x: jax.Array) -> jax.Array:
        part = params["cross_attention"][name]
        product = x.astype(dtype) @ part["kernel"].astype(dtype)
        return product + along_last(part["bias"].astype(dtype), product)

    attention = Attention(heads, config.head_dim, dtype=dtype)
    branch = attention.apply({"params": params["attention"]}, hidden, visible)[0]  # pyright: ignore
    hidden = norm("attention_norm", hidden + branch)
    query, key, value = (
        y.reshape(*y.shape[:2], heads, -1)
        for y in (linear("query", hidden), linear("key", context), linear("value", context))
    )
    weights = attention_weights(query, key)
    mixed = jnp.einsum("bhlm,bmhd->blhd", (weights + offset).astype(dtype), value)
    hidden = norm("cross_attention_norm", hidden + linear("out", mixed.reshape(*mixed.shape[:2], -1)))
    branch = MLP(config.mlp_dim, config.activation, dtype=dtype).apply({"params": params["mlp"]}, hidden)
    return norm("mlp_norm", hidden + branch), weights  # pyright: ignore
