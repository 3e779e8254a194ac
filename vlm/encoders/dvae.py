"""The encoder of DALL-E's discrete autoencoder (Ramesh et al. 2021, appendix A): pictures to visual words.

FLAVA and BEiT predict its words at masked patches. It is never trained here, and always runs in float32, where
accelerators would multiply in less: in lower precision the most likely word of a patch flips now and then.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm.layers.arrays import AnyArray, along_last
from vlm.layers.linear import param
from vlm.strict import at_least


@dataclasses.dataclass(frozen=True)
class DVAEConfig:
    """Architecture; the defaults are the published encoder's (53.8 million parameters).

    Attributes:
      hidden_size: channels of the first group; each further group has twice as many and half the resolution.
      vocab_size: number of visual words.
    """

    num_groups: int = 4
    blocks_per_group: int = 2
    input_channels: int = 3
    hidden_size: int = 256
    vocab_size: int = 8192

    @property
    def downsampling(self) -> int:
        """Pixels along each side of the picture per visual word."""
        return 2 ** (self.num_groups - 1)

    def __post_init__(self) -> None:
        at_least(1, self, "num_groups", "blocks_per_group", "input_channels", "vocab_size")
        if self.hidden_size < 4 or self.hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, found {self.hidden_size}")


class Conv(nn.Module):
    """A convolution of stride 1 that keeps height and width; kernel [side, side, in, out].

    With side 1 it is a linear map, of arrays of any rank.
    """

    features: int
    side: int

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*b c"]) -> Float[Array, "*b d"]:
        x, shape = jnp.asarray(x), (self.side, self.side, x.shape[-1], self.features)
        init = nn.initializers.normal(1 / math.sqrt(math.prod(shape[:3])))
        kernel = param(self, "kernel", init, shape, (None, None, None, None)).astype(jnp.float32)
        bias = param(self, "bias", nn.initializers.zeros_init(), shape[3:], (None,))
        if self.side == 1:
            return jnp.dot(x, kernel[0, 0], precision="highest") + along_last(bias, x)
        layout, convolve = ("NHWC", "HWIO", "NHWC"), jax.lax.conv_general_dilated
        y = convolve(x, kernel, (1, 1), "SAME", dimension_numbers=layout, precision="highest")
        return y + along_last(bias, y)


class Block(nn.Module):
    """x + gain · residual(x), where the residual path is a bottleneck of a quarter of the channels."""

    features: int
    gain: float

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w d"]:
        x = jnp.asarray(x)
        hidden, width = x, self.features // 4
        for number, (features, side) in enumerate(((width, 3), (width, 3), (width, 3), (self.features, 1)), start=1):
            hidden = Conv(features, side, name=f"conv_{number}")(jax.nn.relu(hidden))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, name="identity")(x)
        return x + self.gain * hidden


class Group(nn.Module):
    """Blocks of one width at one resolution."""

    features: int
    num_blocks: int
    gain: float

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b h w c"]) -> Float[Array, "b h w d"]:
        x = jnp.asarray(x)
        for number in range(1, self.num_blocks + 1):
            x = Block(self.features, self.gain, name=f"block_{number}")(x)
        return x


class DVAEEncoder(nn.Module):
    """Pictures to features, and features to scores of every visual word."""

    config: DVAEConfig

    def setup(self) -> None:
        config = self.config
        gain = 1 / (config.num_groups * config.blocks_per_group) ** 2
        self.input = Conv(config.hidden_size, 7)
        for number in range(config.num_groups):
            group = Group(config.hidden_size * 2**number, config.blocks_per_group, gain)
            setattr(self, f"group_{number + 1}", group)
        self.out = Conv(config.vocab_size, 1)

    def __call__(self, image: Float[AnyArray, "b h w c"]) -> Float[Array, "b i j v"]:
        """Scores of every word for every cell, i = h / 8 and j = w / 8 for the published encoder.

        Args:
          image: values in [0.1, 0.9]: 0.8 · pixel / 255 + 0.1.

        Raises:
          ValueError: a side that the downsampling does not divide.
        """
        return self.out(self.features(image))

    def features(self, image: Float[AnyArray, "b h w c"]) -> Float[Array, "b i j f"]:
        """What `out` maps to scores."""
        config, x = self.config, jnp.asarray(image, jnp.float32)
        if any(side % config.downsampling for side in x.shape[1:3]):
            found = f"{x.shape[1]}x{x.shape[2]}"
            raise ValueError(
                f"codebook image: expected sides that are multiples of {config.downsampling}, found {found}"
            )
        x = self.input(x)
        for number in range(1, config.num_groups + 1):
            x = getattr(self, f"group_{number}")(x)
            if number < config.num_groups:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return jax.nn.relu(x)

    def words(self, features: Float[AnyArray, "*b f"]) -> Int[Array, "*b"]:
        """The most likely word of every feature vector."""
        return jnp.argmax(self.out(features), axis=-1).astype(jnp.int32)
