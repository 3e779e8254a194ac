"""One of two processes of four devices each that compute FLAVA's losses of a batch together.

    python one_of_two.py PORT INDEX FOLDER

FOLDER holds params.npz and the batch pairs.npz; the first process writes losses.json there.
"""

import json
import os
import pathlib
import re
import sys


def main(port, index, folder):
    """Computes and writes."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec
    from small import architecture

    from vlm import sharding
    from vlm.models.flava.loss import LossConfig, loss
    from vlm.models.flava.model import FLAVA
    from vlm.schema import MeshConfig, ShardingConfig
    from vlm.tree import unflatten

    jax.distributed.initialize(f"localhost:{port}", 2, index)
    settings = ShardingConfig(mesh=MeshConfig(4, 2, 1))
    mesh, model = sharding.make_mesh(settings.mesh), FLAVA(architecture())
    split, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
    params = unflatten(dict(np.load(folder / "params.npz")))

    def value(params, batch):
        return loss(model, params, {}, batch, jax.random.key(0), LossConfig())

    def step(params, batch):
        (_, (terms, _)), gradients = jax.value_and_grad(value, has_aux=True)(params, batch)
        return terms | {"grad_norm": optax.tree.norm(gradients)}

    half = {name: rows[4 * index : 4 * index + 4] for name, rows in np.load(folder / "pairs.npz").items()}
    with sharding.use(mesh, settings.rules):
        batch = sharding.put_batch(half, split, 8)
        terms = jax.jit(step, out_shardings=whole)(jax.device_put(params, whole), batch)
    if index == 0:
        (folder / "losses.json").write_text(json.dumps({name: float(term) for name, term in terms.items()}))


if __name__ == "__main__":
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags += " --xla_force_host_platform_device_count=4"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    sys.path[:0] = [str(pathlib.Path(__file__).parents[3]), str(pathlib.Path(__file__).parent)]
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
