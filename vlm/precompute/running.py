"""Computes the parts of a cache, each host its own on its own devices, and joins them.

A part's rows depend on its records alone: batches begin with a part, hold nothing of another, and have the same shape
on every device, however many devices and hosts there are and wherever an earlier run was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm import sharding, workdir
from vlm.checkpoint.processes import from_primary, on_every_process
from vlm.data.cache_parts import CacheParts
from vlm.errors import UserError
from vlm.initial import starting_weights, still_random
from vlm.schema import Config, MeshConfig
from vlm.strict import plain
from vlm.training import put_weight
from vlm.tree import flatten, unflatten

Mine = Callable[[int], bool]
Items = Iterable[tuple[int, Any, Any]]
"""(part, name of an item, item): parts in order, and each of them; one that is another's has a single None as name."""


def run(
    output: str,
    items: Callable[[Mine], Items],
    rows: Callable[[list[Any]], Any],
    batch_size: int,
    about: dict[str, Any],
    on: contextlib.AbstractContextManager,
) -> int:
    """Makes the cache `output`; returns how many items it holds. Every host calls it.

    Args:
      items: what is computed, of the parts that a function names.
      rows: rows of `batch_size` items, on the devices.
      about: what the result depends on, see `CacheParts`.
      on: what is entered while rows are computed, and hosts do not talk to each other.

    Raises:
      UserError: on every host: unreadable data, a folder of other parts or of another process, no item at all.
    """
    parts = CacheParts(Path(f"{output}.parts"), about)
    with contextlib.ExitStack() as stack:
        from_primary(lambda: stack.enter_context(workdir.claim(parts.path, "--output")))
        from_primary(parts.begin)
        finished = frozenset(from_primary(parts.finished))
        host, hosts = jax.process_index(), jax.process_count()

        def mine(part: int) -> bool:
            return part % hosts == host and part not in finished

        def compute() -> int:
            parts.check()
            with on:
                return _compute(parts, items(mine), mine, rows, batch_size)

        try:
            count = on_every_process(compute)
        except Exception:  # on every host, whatever it was on the one that failed
            from_primary(parts.forget)
            raise
        return from_primary(lambda: parts.join(Path(output), count))


def _compute(parts: CacheParts, items: Items, mine: Mine, rows: Callable[[list[Any]], Any], batch_size: int) -> int:
    """Writes this host's parts; returns the number of all."""
    count = 0
    for part, members in itertools.groupby(items, key=itemgetter(0)):
        count = part + 1
        if mine(part):
            batches = list(computed(((name, item) for _, name, item in members if name is not None), rows, batch_size))
            names = [name for batch, _ in batches for name in batch]
            parts.write(part, names, np.concatenate([values for _, values in batches]) if batches else None)
    return count


def computed(
    items: Iterable[tuple[Any, Any]], rows: Callable[[list[Any]], Any], batch_size: int
) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Names of items and their rows, batch by batch; the devices have the next batch when one is handed out."""
    running: tuple[list[Any], Any] | None = None
    items = iter(items)
    while True:
        chunk = list(itertools.islice(items, batch_size))
        content = [item for _, item in chunk]
        padded = content + content[-1:] * (batch_size - len(content))  # one shape, one compilation
        following = ([name for name, _ in chunk], rows(padded)) if chunk else None
        if running is not None:
            yield running[0], np.asarray(running[1])[: len(running[0])]
        if following is None:
            return
        running = following


def about(settings: Config, weights: str, sources: Sequence[Any], **more: Any) -> dict[str, Any]:
    """What a result depends on, for `run`."""
    return {
        "teacher": weights,
        "sources": [source.fingerprint for source in sources],
        "processor": hashlib.sha256(repr(sorted(plain(settings.processor).items())).encode()).hexdigest(),
        "device": jax.local_devices()[0].device_kind,
        **more,
    }


def own_devices() -> Mesh:
    """A mesh of this host's devices, over which batches are split."""
    return sharding.make_mesh(MeshConfig(), jax.local_devices())


def on_devices(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function` of weights and a batch of NumPy arrays, compiled, each device with its rows."""
    split, compiled = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names))), jax.jit(function)
    return lambda weights, batch: compiled(weights, jax.device_put(batch, split))


def frozen_weights(
    settings: Config, entries: Sequence[Any], mesh: Mesh, what: str, processor: Any = None, **abstract: Any
) -> Any:
    """The arrays of `params` or `extra`, whole on every device of `mesh`, from entries of `config.init`.

    With a `processor`, what its tokenizers are to the checkpoints' is told as of a run (`starting_weights`).

    Raises:
      UserError: no entry gives some of them.
    """
    everywhere = sharding.make_mesh(MeshConfig())  # of all hosts: they read together
    rules = settings.sharding.rules
    placed = {name: sharding.place(tree, rules, everywhere.shape) for name, tree in abstract.items()}
    placements = SimpleNamespace(**({"params": {}, "extra": {}} | placed))
    with sharding.use(everywhere, rules):
        start = starting_weights(entries, placements, everywhere, processor=processor)
        if missing := still_random(start, placements):
            raise UserError(f"config.init: no checkpoint gives the {what}'s weights {missing}")
        targets = flatten(placed)
        whole = {path: put_weight(path, leaf, targets, everywhere) for path, leaf in start.items()}
        local = unflatten({path: np.asarray(array.addressable_data(0)) for path, array in whole.items()})
    return jax.device_put(local, NamedSharding(mesh, PartitionSpec()))


def digest(architecture: Any, weights: Any) -> str:
    """SHA-256 of a model's configuration and weights."""
    found = hashlib.sha256(repr(architecture).encode())
    for path, leaf in sorted(flatten(weights).items()):
        found.update(path.encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()
