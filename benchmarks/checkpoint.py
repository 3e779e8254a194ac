"""What proof costs: saving and restoring with fingerprints, checksums and manifest, against orbax alone.

    python -m benchmarks.checkpoint [--gib=1] [--rounds=3] [--directory=DIR]

Random float32 values, which is what weights look like to a compressor, in 16 arrays. Contenders alternate: `orbax` with
its defaults, `uncompressed` (what `Checkpoints` has it do), `vlm` with everything verified. `save` is
until durable, `blocked` the part of it during which a training loop waits (both copy to host memory in it), `restore`
until the values are on the device and verified. The last line is JSON: medians in seconds, and the share that
verification adds, from wall and from CPU time.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vlm.checkpoint import Checkpoints
from vlm.checkpoint.fingerprint import fingerprints
from vlm.checkpoint.reading import read_arrays
from vlm.checkpoint.saving import _digests


class Clock:
    """Wall and CPU seconds of one stretch."""

    def __enter__(self):
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error):
        self.wall, self.cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def make_state(gib: float) -> dict[str, jax.Array]:
    """16 arrays of random values that add up to `gib`."""
    rows = max(1, round(gib * 2**30 / 16 / 4 / 4096))
    keys = jax.random.split(jax.random.key(0), 16)
    return jax.block_until_ready({f"layer{i}": jax.random.normal(k, (rows, 4096)) for i, k in enumerate(keys)})


def run_orbax(folder: pathlib.Path, state: dict[str, jax.Array], compression: bool = True) -> dict[str, Clock]:
    """Saves and restores with orbax's asynchronous checkpointer and nothing else."""
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()
    }
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=compression)) as checkpointer:
        with Clock() as save:
            with Clock() as blocked:
                checkpointer.save(folder / "1", args=ocp.args.PyTreeSave(state))
            checkpointer.wait_until_finished()
        with Clock() as restore:
            jax.block_until_ready(read_arrays(folder / "1", targets))
    return {"save": save, "blocked": blocked, "restore": restore}


def run_uncompressed(folder: pathlib.Path, state: dict[str, jax.Array]) -> dict[str, Clock]:
    """The same without compression, as `Checkpoints` uses orbax."""
    return run_orbax(folder, state, compression=False)


def run_ours(folder: pathlib.Path, state: dict[str, jax.Array]) -> dict[str, Clock]:
    """Saves and restores with `Checkpoints`, as a run does from its second save on."""
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()
    }
    checkpoints = Checkpoints(folder)
    checkpoints._tested = True  # only a run's first save is read back
    with Clock() as save:
        with Clock() as blocked:
            checkpoints.save(1, state, {}, "hash")
        checkpoints.wait()
    with Clock() as restore:
        jax.block_until_ready(checkpoints.restore(targets))
    with Clock() as fingerprint:
        fingerprints(state)
    with Clock() as checksums:
        _digests(folder / "1")
    checkpoints.close()
    clocks = {"save": save, "blocked": blocked, "restore": restore}
    return clocks | {"fingerprints": fingerprint, "checksums": checksums}


def main() -> None:
    """Runs the comparison and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=pathlib.Path, default=None, help="where to write; default: temporary")
    options = parser.parse_args()
    state = make_state(options.gib)
    contenders = {"orbax": run_orbax, "uncompressed": run_uncompressed, "vlm": run_ours}
    results: dict[str, list[dict[str, Clock]]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            folder = pathlib.Path(tempfile.mkdtemp(dir=options.directory))
            try:
                measured = contenders[name](folder, state)
            finally:
                shutil.rmtree(folder)
            if number:  # the first round warms up
                results[name].append(measured)
                print(name, {key: round(clock.wall, 2) for key, clock in measured.items()}, flush=True)

    def median(name: str, part: str, unit: str) -> float:
        return statistics.median(getattr(run[part], unit) for run in results[name])

    def added(to: str) -> dict[str, dict[str, float]]:
        share = lambda part, unit: round(median("vlm", part, unit) / median(to, part, unit) - 1, 3)  # noqa: E731
        return {part: {unit: share(part, unit) for unit in ("wall", "cpu")} for part in ("save", "restore")}

    seconds = {name: {part: round(median(name, part, "wall"), 3) for part in results[name][0]} for name in contenders}
    shares = {f"added_to_{name}": added(name) for name in contenders if name != "vlm"}
    record = {"benchmark": "checkpoint", "gib": options.gib, "seconds": seconds, **shares}
    record |= {"rounds": options.rounds, "load": round(os.getloadavg()[0], 2), "cores": os.cpu_count()}
    print(json.dumps(record | {"jax": jax.__version__, "orbax": ocp.__version__, "dtype": str(jnp.float32.dtype)}))


if __name__ == "__main__":
    main()
