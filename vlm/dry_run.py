"""What a run would do, without allocating a weight: the configuration, parameters, their layout, memory, a batch."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm import sharding
from vlm.checks import check_batch, tracing
from vlm.config import to_json
from vlm.errors import UserError
from vlm.experiment import Experiment, experiment, make_processor, open_data
from vlm.optimizer import Optimizer
from vlm.schema import Config, MeshConfig
from vlm.sharding import Placement
from vlm.strict import build


def describe(settings: Config, config: Any) -> str:
    """The whole report.

    Raises:
      UserError: anything a real start would refuse about model, optimizer or sharding.
    """
    parts = experiment(settings)
    sizes = planned_mesh(settings.sharding.mesh)
    abstract = parts.init.abstract()
    state = sharding.place(abstract, settings.sharding.rules, sizes)
    rows = (settings.data.batch_size, sizes, settings.optimizer.accumulation_steps, settings.train.pack_texts)
    sharding.batch_spec(settings.sharding, *rows)
    sections = [
        ("configuration", to_json(config).rstrip()),
        ("parameters by module", _modules(state.params, parts.optimizer)),
        ("parameters", _parameters(state.params, parts.optimizer)),
        ("memory per device", _memory(state, parts.optimizer, sizes)),
        ("replicated although a rule would split them", _replicated(state)),
        *_batches(settings, parts, sharding.unbox(abstract)),
    ]
    return "\n".join(f"== {title}\n{text}\n" for title, text in sections)


def planned_mesh(mesh: MeshConfig) -> dict[str, int]:
    """The mesh of the run: with -1, on the devices of this machine; otherwise on as many as it names."""
    fixed = math.prod(size for size in (mesh.data, mesh.fsdp, mesh.tensor) if size != -1)
    open_ended = -1 in (mesh.data, mesh.fsdp, mesh.tensor)
    return sharding.mesh_shape(mesh, max(fixed, jax.device_count() // fixed * fixed) if open_ended else fixed)


def _count(placements: Sequence[Placement]) -> int:
    return sum(math.prod(placement.shape) for placement in placements)


def _modules(params: Any, optimizer: Optimizer) -> str:
    """Parameters of every module down to the second level, and how many of them are trained."""
    groups: dict[str, list[Placement]] = {}
    for placement in jax.tree.leaves(params):
        path = placement.path.removeprefix("params/").split("/")
        for depth in range(min(len(path), 3)):
            groups.setdefault("/".join(path[:depth]) or "total", []).append(placement)
    rows = []
    for name in ["total", *sorted(set(groups) - {"total"})]:
        learn = [p for p in groups[name] if not optimizer.groups[p.path.removeprefix("params/")].freeze]
        rows.append((name, f"{_count(groups[name]):,}", f"{_count(learn):,}"))
    return table(("module", "parameters", "trainable"), rows)


def _parameters(params: Any, optimizer: Optimizer) -> str:
    rows = []
    for placement in jax.tree.leaves(params):
        path = placement.path.removeprefix("params/")
        group = optimizer.groups[path]
        how = "frozen" if group.freeze else f"lr x{group.lr_multiplier:g}, decay {optimizer.decay[path]:g}"
        spec = ", ".join("-" if axis is None else "+".join(np.atleast_1d(axis)) for axis in placement.spec)
        rows.append((path, "x".join(map(str, placement.shape)), str(placement.dtype), spec or "-", how))
    return table(("path", "shape", "dtype", "split over", "training"), rows)


def _memory(state: Any, optimizer: Optimizer, sizes: Mapping[str, int]) -> str:
    rows = []
    for name in ("params", "opt_state", "ema", "extra"):
        part = getattr(state, name)
        whole = sum(placement.size_in_bytes for placement in jax.tree.leaves(part))
        rows.append((name, size(whole), size(sharding.bytes_per_device(part))))
    whole = sum(placement.size_in_bytes for placement in jax.tree.leaves(state))
    rows.append(("state", size(whole), size(sharding.bytes_per_device(state))))
    gradients = sharding.bytes_per_device(optimizer.split(state.params)[0])
    mesh = " x ".join(f"{axis}={ways}" for axis, ways in sizes.items())
    note = f"mesh {mesh}; gradients add up to {size(gradients)}, activations come on top"
    return table(("part", "whole", "per device"), rows) + "\n" + note


def _replicated(state: Any) -> str:
    return "\n".join(sharding.replicated((state.params, state.extra))) or "none"


def _batches(settings: Config, parts: Experiment, state: Any) -> list[tuple[str, str]]:
    """A section for the batches of each stream, or one for all."""
    data = settings.data
    if not data.streams:
        return [("one batch", _batch(settings, parts, state, data.sources))]
    sections = []
    for name, share in data.streams.items():
        sources = [source for source in data.sources if source["stream"] == name]
        title = f"one batch of {name}, {share / sum(data.streams.values()):.1%} of the steps"
        sections.append((title, _batch(settings, parts, state, sources)))
    return sections


def _batch(settings: Config, parts: Experiment, state: Any, specs: Sequence[Mapping[str, Any]]) -> str:
    """One example through the processor; where its data are not here, what the loss reads of what could be made."""
    note, batch = "", settings.data.batch_size
    try:
        processor = make_processor(settings, parts.family)
        sources, _, transform = open_data(settings, processor, specs)
        arrays: Mapping[str, Any] = transform(sources[0][0], np.random.default_rng(0), True)
        shapes: Mapping[str, Any] = {name: (np.shape(value), np.asarray(value).dtype) for name, value in arrays.items()}
    except (UserError, OSError) as error:
        note = f"\nfrom the settings; an example of the data is not available here: {error}"
        rows, arguments = parts.family.processor.rows, {}
        if "fields" in inspect.signature(rows).parameters and all("fields" in spec for spec in specs):
            arguments["fields"] = {field for spec in specs for field in spec["fields"]}
        rows = rows(build(parts.family.processor_type, settings.processor, "processor"), **arguments)
        if settings.data.teacher_cache is not None:
            rows = rows | {"target": ((parts.loss_config.target_dim(parts.model_config),), "float32")}
        if settings.data.codebook_cache is not None and "patch_mask" in rows:
            rows = rows | {"patch_labels": (rows["patch_mask"][0], "int32")}
        # The family's loss does not see raw pixels.
        pixels = {"image": (rows["image"][0], "float32")} if "image" in rows else {}
        read = _read_by_loss(parts, state, _abstract(rows | pixels, batch))
        shapes = {name: row for name, row in rows.items() if name in read}
    else:
        check_batch(parts, state, _abstract(shapes, batch))
    rows = [(name, "x".join(map(str, (batch, *shape))), str(dtype)) for name, (shape, dtype) in sorted(shapes.items())]
    return table(("array", "shape", "dtype"), rows) + note


def _abstract(rows: Mapping[str, Any], batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in rows.items()}


class _Watched(dict):
    """A batch that notes which arrays are read."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - to be noted


def _read_by_loss(parts: Experiment, state: Any, batch: Mapping[str, Any]) -> set[str]:
    """Traces the loss; arrays that only the data could tell end the trace early.

    Raises:
      UserError: what could be made does not fit the model.
    """
    read: set[str] = set()

    def trace(state: Any, batch: Any) -> Any:
        watched = _Watched(batch)
        try:
            rng, config = jax.random.key(0), parts.loss_config
            return parts.family.loss(parts.model, state.params, state.extra, watched, rng, config)[0]
        finally:
            read.update(watched.read)

    with tracing("the processor's settings do not fit the model"), contextlib.suppress(KeyError, UserError):
        jax.eval_shape(trace, state, dict(batch))
    return read


def size(count: int) -> str:
    """Bytes as "1.50 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns; columns of numbers are right-aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numbers = re.compile(r"[\d,.]+( [KMG]i?B| B)?")
    numeric = [all(numbers.fullmatch(row[i]) for row in rows) for i in range(len(header))]
    aligned = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)
