"""A family small enough to start, train and stop a whole run in seconds: two linear maps, contrastive."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm.family import Family
from vlm.layers.linear import Linear, constrain


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 8
    dropout_rate: float = 0.1
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class ToyLoss:
    scale: float = 1.0


class Toy(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, image, tokens, mask, deterministic=True):
        width, dtype = self.config.width, jnp.dtype(self.config.dtype)
        x = constrain(image.mean((1, 2)), "batch", None).astype(dtype)
        x = Linear(width, ("embed", "mlp"), dtype=dtype, name="image")(x)
        x = nn.Dropout(self.config.dropout_rate, deterministic=deterministic)(x)
        text = (tokens * mask).astype(dtype)
        return x, Linear(width, ("embed", "mlp"), use_bias=False, dtype=dtype, name="text")(text)


def loss(model, params, extra, batch, rng, config):
    if "image" not in batch:  # texts alone: another objective
        nothing = jnp.zeros((len(batch["tokens"]), 4, 4, 3))
        _, y = model.apply({"params": params}, nothing, batch["tokens"], batch["mask"])
        value = jnp.square(y - 1).mean()
        return value, ({"text": value}, {"seen": extra["seen"] + 1})
    inputs = batch["image"], batch["tokens"], batch["mask"]
    x, y = model.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": rng})
    logits = config.scale * (x @ y.T)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(x))).mean()
    return value, ({"contrastive": value}, {"seen": extra["seen"] + 1})


@dataclasses.dataclass(frozen=True)
class ToySettings:
    size: int = 4
    poison: int = -1
    max_length: int = 4


class ToyProcessor:
    def __init__(self, size, poison):
        self.size, self.poison = size, poison

    @classmethod
    def from_config(cls, settings):
        return cls(settings.size, settings.poison)

    @staticmethod
    def rows(settings, fields=("text",)):
        text = {"unused": ((3,), "int32"), "tokens": ((4,), "int32"), "mask": ((4,), "bool")}
        return text if "alone" in fields else text | {"image": ((4, 4, 3), "float32")}

    def example(self, example, rng, train):
        text = np.frombuffer(example["text"].encode()[:4].ljust(4), np.uint8).astype(np.int32)
        image = rng.normal(size=(self.size, self.size, 3)).astype(np.float32)
        if int(example["text"]) == self.poison:
            image[0] = np.nan
        row = {"tokens": text - 48, "mask": np.ones(4, bool)}
        return row if "alone" in example else row | {"image": image}

    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "processor.json").write_text(json.dumps({"size": self.size}))


FAMILY = Family(
    name="toy",
    config_type=ToyConfig,
    module=Toy,
    loss_type=ToyLoss,
    loss=loss,
    init_extra=lambda model, params, rng, config: {"seen": jnp.zeros((), jnp.int32)},
    example=lambda config: {
        "image": jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((1, 4), jnp.int32),
        "mask": jax.ShapeDtypeStruct((1, 4), jnp.bool_),
    },
    processor_type=ToySettings,
    processor=ToyProcessor,
    weights=types.SimpleNamespace(HF_MODEL_TYPES=(), LAYOUTS=()),
)
