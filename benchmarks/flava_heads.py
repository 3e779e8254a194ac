"""How much arithmetic FLAVA's heads save by running on the masked positions only, for the published sizes.

    python -m benchmarks.flava_heads [--batch=8]

Traces the loss and its gradient for each kind of batch (nothing is computed) with the heads, and the last layers before
them, on all positions and on those that can be masked as configs/flava.py:full says: 75 of 196 patches; 12 of 77 tokens
of a pair, 128 of 512 of a text. Counts matrix products and convolutions of the traced program, loops as often as they
run (XLA's own count of a compiled program takes the scanned layers once). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import flava
from vlm.flops import count_flops
from vlm.models.flava import example
from vlm.models.flava.config import FLAVAConfig
from vlm.models.flava.loss import LossConfig, loss
from vlm.models.flava.model import FLAVA
from vlm.strict import build
from vlm.tree import flatten, unflatten


def arrays(rows: int, length: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of a batch of pairs; without the codebook's picture, whose cost is the same either way."""
    text = dict.fromkeys(("tokens", "masked_tokens", "token_labels"), ((rows, length), "int32"))
    image = {"image": ((rows, 224, 224, 3), "float32"), "patch_mask": ((rows, 196), "bool")}
    image |= {"patch_labels": ((rows, 196), "int32")}
    return {**text, "mask": ((rows, length), "bool"), **image, "itm_labels": ((rows,), "int32")}


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    rows = parser.parse_args().batch
    model = FLAVA(FLAVAConfig(codebook=None))
    params = nn.unbox(jax.eval_shape(lambda key: model.init(key, **example(model.config)), jax.random.key(0)))["params"]
    trained = {p: x for p, x in flatten(params).items()}

    def flops(names: tuple[str, ...], length: int, config: LossConfig) -> float:
        def value(params, batch):
            return loss(model, unflatten(params), {}, batch, jax.random.key(0), config)[0]

        shapes = arrays(rows, length)
        batch = {name: jax.ShapeDtypeStruct(shapes[name][0], jnp.dtype(shapes[name][1])) for name in names}
        return count_flops(jax.jit(jax.value_and_grad(value)).trace(trained, batch).jaxpr)

    image, text = ("image", "patch_mask", "patch_labels"), ("tokens", "mask", "masked_tokens", "token_labels")
    kinds = {"pairs": ((*image, *text, "itm_labels"), 77), "images": (image, 77), "text": (text, 512)}
    shipped = build(LossConfig, flava.get_config("full").loss, "loss")
    everywhere = dataclasses.replace(shipped, max_masked_patches=None, max_masked_tokens=None, max_masked_words=None)
    found = {}
    for kind, (names, length) in kinds.items():
        whole, masked = flops(names, length, everywhere), flops(names, length, shipped)
        found[kind] = {"all": whole / 1e9, "masked": masked / 1e9, "saved": round(1 - masked / whole, 3)}
    print(json.dumps({"benchmark": "flava_heads", "batch": rows, "gflop_per_step": found}))


if __name__ == "__main__":
    main()
