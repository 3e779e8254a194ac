"""ViT-B/16 forward against Hugging Face CLIPVisionModel: sdpa and torch.compile; share of the matrix-product rate.

    python -m benchmarks.vit_forward [--batch=8] [--rounds=9]

float32, 224 px, the same pictures, alternating in one process; medians and ratios as one JSON line. The model's rate
counts matrix products only (patches, attention, MLP); the machine's is the best of a large float32 product.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import alternate, report
from vlm.encoders.vit import ViT, ViTConfig

SIZE = 3072


def flops(config: ViTConfig, batch: int) -> float:
    """Floating-point operations of the matrix products of one forward pass."""
    patches, width = config.num_patches, config.hidden_size
    tokens = patches + 1
    layer = 2 * tokens * width * (4 * width + 2 * config.mlp_dim) + 4 * tokens**2 * width
    return batch * (2 * patches * config.patch_size**2 * 3 * width + config.num_layers * layer)


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    image = np.random.default_rng(0).normal(size=(options.batch, 224, 224, 3)).astype(np.float32)
    config = ViTConfig(patch_size=16)
    model = ViT(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), image[:1]))
    forward, pixels = jax.jit(lambda p, x: model.apply(p, x).pooler_output), jnp.asarray(image)
    hf = transformers.CLIPVisionConfig(patch_size=16, attn_implementation="sdpa")
    theirs = transformers.CLIPVisionModel(hf).eval()
    tensor = torch.tensor(image.transpose(0, 3, 1, 2)).contiguous()
    square = jnp.ones((SIZE, SIZE))
    product = jax.jit(jnp.dot)

    def run_torch(module):
        with torch.inference_mode():
            return module(tensor)

    contenders = {
        "vlm": lambda: forward(params, pixels).block_until_ready(),
        "transformers_sdpa": lambda: run_torch(theirs),
        "matrix_product": lambda: product(square, square).block_until_ready(),
    }
    if not options.no_compile:
        compiled = torch.compile(theirs)
        contenders["transformers_compiled"] = lambda: run_torch(compiled)
    times = alternate(contenders, rounds=options.rounds)
    peak = 2 * SIZE**3 / min(wall for wall, _ in times["matrix_product"])
    rate = flops(config, options.batch) / statistics.median(wall for wall, _ in times["vlm"])
    ours, compiled_time = times["vlm"], times.get("transformers_compiled")
    ratio = compiled_time and statistics.median(w for w, _ in compiled_time) / statistics.median(w for w, _ in ours)
    report(
        "vit_forward",
        times,
        reference="transformers_sdpa",
        settings=vars(options),
        gflops=round(rate / 1e9, 1),
        matrix_product_gflops=round(peak / 1e9, 1),
        share_of_matrix_product_rate=round(rate / peak, 3),
        times_faster_than_compiled=ratio and round(ratio, 3),
    )


if __name__ == "__main__":
    main()
