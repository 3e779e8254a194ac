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
from jaxtyping import Bool, Float, Int

from vlm.errors import UserError
from vlm.fusion.med import MedLayer
from vlm.layers.arrays import AnyArray
from vlm.layers.masks import padding_mask
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
        run, hidden, seen = MedLayer(config.text, config.shared_decoder, output_attentions=True).apply, start, []
        for number in range(layer, config.text.num_layers):
            more = offset if number == layer else None
            one = {"params": layer_params(number)}
            hidden, output = run(one, hidden, LayerInput(), visible, states, None, more)  # pyright: ignore
            seen.append(output.cross_attention)  # pyright: ignore
        logits = model.apply(variables, hidden[:, 0], method=lambda module, x: module.itm_head(x))
        return logits[:, 1].sum(), (seen[0], logits)

    shape = (len(tokens), config.text.num_heads, tokens.shape[1], states.shape[1])
    gradient, (weights, logits) = jax.grad(score, has_aux=True)(jnp.zeros(shape, states.dtype))
    return Attended(weights, gradient, logits)
