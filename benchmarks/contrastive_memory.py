"""How much memory one device needs for the contrastive loss and its gradient, read from the compiled program.

    python -m benchmarks.contrastive_memory [--batches=32768,131072] [--width=768]

Compiles (and never runs) both forms for 8 devices, embeddings split over them, and prints the temporary bytes per
device that the compiler reports beside B²·4, the size of the whole matrix of logits.
Exits 1 if a form needs more than its bound: rows 2.2 · B²/n · 4 bytes, ring 4 · (B/n)² · 4 bytes, plus the embeddings.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm.losses import contrastive


def temporary_bytes(form: str, batch: int, width: int, shape: tuple[int, int, int]) -> int:
    """Temporary bytes per device of value and gradient at a global batch."""
    grid = np.asarray(jax.devices()[:8]).reshape(shape)
    mesh = Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    embeds = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=split)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = jax.value_and_grad(functools.partial(contrastive, form=form), argnums=(0, 1, 2))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(embeds, embeds, scale).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", default="32768,131072")
    parser.add_argument("--width", type=int, default=768)
    options = parser.parse_args()
    rows, failed = [], False
    print(f"{'batch':>8} {'mesh':>9} {'form':>5} {'per device':>13} {'whole B²·4':>13} {'share':>7} {'bound':>13}")
    for batch in map(int, options.batches.split(",")):
        for shape in ((8, 1, 1), (2, 2, 2)):
            for form in ("rows", "ring"):
                used = temporary_bytes(form, batch, options.width, shape)
                whole, embeds = batch**2 * 4, batch * options.width * 4
                blocks = 2.2 * whole / 8 + 3 * embeds if form == "rows" else 4 * whole / 64
                bound = int(blocks + 12 * embeds / 8)
                failed |= used > bound
                mesh = "x".join(map(str, shape))
                sizes = [f"{size / 2**20:9.0f} MiB" for size in (used, whole, bound)]
                print(f"{batch:>8} {mesh:>9} {form:>5} {sizes[0]} {sizes[1]} {used / whole:7.2%} {sizes[2]}")
                rows.append({"batch": batch, "mesh": mesh, "form": form, "bytes": used, "whole": whole, "bound": bound})
    print(json.dumps({"devices": 8, "width": options.width, "jax": jax.__version__, "rows": rows}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
