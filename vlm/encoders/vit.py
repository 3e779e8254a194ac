"""The vision transformer (Dosovitskiy et al. 2021) that all families share, with the variants their papers use."""

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
from vlm.layers.linear import Linear, constrain, param
from vlm.layers.masks import padding_mask
from vlm.layers.mlp import Activation
from vlm.layers.norms import LayerNorm
from vlm.layers.positions import resize_positions
from vlm.layers.transformer import Remat, TransformerBlock, check_stack, scan_layers

normal = nn.initializers.normal


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Architecture of a vision transformer; the defaults are CLIP ViT-B/32's.

    Attributes:
      image_size: side of the square images that the position table was made for; other sizes resize the table.
      patch_bias: whether the patch projection has a bias (CLIP: no; BLIP, FLAVA: yes).
      input_norm: LayerNorm between the embeddings and the first layer (CLIP's "pre_layrnorm").
      output_norm: "all" tokens are normalised after the last layer (BLIP, FLAVA); the pooled "class" token only, while
        the last hidden state stays raw (CLIP); or "none". "twice" is "all" with the pooled token normalised once more
        by the same norm (HF's BlipModel; no released weights use it).
      mask_token: a learned embedding that replaces masked patches (masked image modelling).
      pooler: tanh(Linear(class token)) as `pooler_output` instead of the class token itself (FLAVA).
      init: "clip" scales by depth and width (Radford et al. 2021, HF's form); "normal" is N(0, 0.02).
      remat, scan_unroll: see `layers.transformer.scan_layers`.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    image_size: int = 224
    patch_size: int = 32
    activation: Activation = "quick_gelu"
    norm_eps: float = 1e-5
    patch_bias: bool = False
    input_norm: bool = True
    output_norm: Literal["none", "class", "all", "twice"] = "class"
    class_token: bool = True
    qkv_bias: bool = True
    mask_token: bool = False
    pooler: bool = False
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    init: Literal["clip", "normal"] = "clip"
    dtype: str = "float32"
    remat: Remat = "none"
    scan_unroll: int = 1

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches of an image of the configured size."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        check_stack(self, "image_size", "patch_size")
        if self.image_size % self.patch_size:
            expected = f"expected a multiple of patch_size={self.patch_size}"
            raise ValueError(f"image_size: {expected}, found {self.image_size}")
        if self.pooler and not self.class_token:
            raise ValueError("pooler: expected class_token=True beside it, found False")


def patchify(image: Float[AnyArray, "b h w c"], patch_size: int) -> Float[Array, "b p f"]:
    """Cuts images into non-overlapping patches, row by row; a patch is flattened as (row, column, channel).

    A strided convolution is then one matrix product (faster on CPU, equal elsewhere). Rows and columns that do not
    fill a patch are dropped, as a convolution without padding drops them.
    """
    image = jnp.asarray(image)
    batch, height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    image = image[:, : rows * patch_size, : columns * patch_size]
    image = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return image.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size * patch_size * channels)


class ViT(nn.Module):
    """Patches and a class token through pre-norm transformer layers."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        image: Float[AnyArray, "b h w c"],
        *,
        patch_mask: Bool[AnyArray, "b p"] | None = None,
        mask: Bool[AnyArray, "b n"] | None = None,
        deterministic: bool = True,
        interpolate_positions: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        outputs_at: Int[AnyArray, "b k"] | None = None,
    ) -> EncoderOutput:
        """Encodes normalised images.

        Args:
          image: float[B, H, W, 3]; H and W equal `image_size` unless `interpolate_positions`.
          patch_mask: true where a patch is replaced by the mask embedding.
          mask: true at the tokens (class token first) that others may attend to; None: all.
          outputs_at: the tokens whose last states are wanted, in place of all; the first is what is pooled.

        Raises:
          ValueError: another image size without `interpolate_positions`, or a patch mask without a mask embedding.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        hidden = self._embed(jnp.asarray(image, dtype), patch_mask, interpolate_positions)
        if config.input_norm:
            hidden = LayerNorm(config.norm_eps, dtype, name="input_norm")(hidden)
        hidden = constrain(hidden, "batch", "length", "embed_activation")
        output = scan_layers(
            partial(TransformerBlock, **self._block()),
            config.num_layers,
            hidden,
            *(() if mask is None else (padding_mask(mask),)),
            drop_path_rate=config.drop_path_rate,
            remat=config.remat,
            unroll=config.scan_unroll,
            deterministic=deterministic,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            outputs_at=outputs_at,
        )
        hidden, pooled, states = output.hidden, output.hidden[:, 0] if config.class_token else None, None
        if config.output_norm != "none":
            norm = LayerNorm(config.norm_eps, dtype, name="output_norm")
            if config.output_norm in ("all", "twice"):
                states, hidden = hidden, norm(hidden)
                pooled = hidden[:, 0] if config.class_token else None
            if pooled is not None and config.output_norm in ("class", "twice"):
                pooled = norm(pooled)
        if config.pooler:
            assert pooled is not None
            pooled = jnp.tanh(Linear(config.hidden_size, ("embed", "projection"), dtype=dtype, name="pooler")(pooled))
        return EncoderOutput(hidden, pooled, output.hidden_states, output.attentions, pre_norm_state=states)

    def _embed(self, image: jax.Array, patch_mask: Any, interpolate: bool) -> Float[Array, "b n e"]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        expected, (height, width) = config.image_size, image.shape[1:3]
        if (height, width) != (expected, expected) and not interpolate:
            raise ValueError(
                f"image: expected {expected}x{expected} pixels, found {height}x{width} "
                "(interpolate_positions=True accepts other sizes)"
            )
        patches = patchify(image, config.patch_size)
        project = Linear(
            config.hidden_size, ("patch", "embed"), config.patch_bias, normal(0.02), dtype=dtype, name="patch_embedding"
        )
        hidden = project(patches)
        if patch_mask is not None:
            if not config.mask_token:
                raise ValueError("patch_mask: this vision encoder has no mask embedding (mask_token=False)")
            hidden = jnp.where(patch_mask[:, :, None], self._vector("mask_embedding", 0.0).astype(dtype), hidden)
        elif config.mask_token:
            self._vector("mask_embedding", 0.0)
        if config.class_token:
            token = self._vector("class_embedding", config.hidden_size**-0.5 if config.init == "clip" else 0.02)
            token = jnp.broadcast_to(token.astype(dtype), (hidden.shape[0], 1, config.hidden_size))
            hidden = jnp.concatenate([token, hidden], axis=1)
        shape = (config.num_patches + int(config.class_token), config.hidden_size)
        table = param(self, "position_embedding", normal(0.02), shape, ("position", "embed"))
        if interpolate:
            grid = (height // config.patch_size, width // config.patch_size)
            table = resize_positions(table, grid, num_prefix=int(config.class_token))
        return hidden + table.astype(dtype)[None]

    def _vector(self, name: str, stddev: float) -> Float[Array, " e"]:
        init = normal(stddev) if stddev else nn.initializers.zeros_init()
        return param(self, name, init, (self.config.hidden_size,), ("embed",))

    def _block(self) -> dict[str, Any]:
        """Keywords of one layer. The "clip" initialisation keeps the residual stream's variance with depth."""
        config = self.config
        block: dict[str, Any] = {
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "mlp_dim": config.mlp_dim,
            "activation": config.activation,
            "norm_eps": config.norm_eps,
            "qkv_bias": config.qkv_bias,
            "dropout_rate": config.dropout_rate,
            "attention_dropout_rate": config.attention_dropout_rate,
            "dtype": jnp.dtype(config.dtype),
        }
        if config.init == "clip":
            width, depth = config.hidden_size, config.num_layers
            residual = width**-0.5 * (2 * depth) ** -0.5
            block |= {"qkv_init": normal(residual), "out_init": normal(width**-0.5)}
            block |= {"up_init": normal((2 * width) ** -0.5), "down_init": normal(residual)}
        return block
