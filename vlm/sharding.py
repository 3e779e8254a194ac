"""Where every array lives: the mesh, logical axes mapped to mesh axes, and what each device then holds.

A weight names its logical axes where it is created ("embed", "mlp"); `ShardingConfig.rules` maps them to the mesh axes
data, fsdp and tensor. Optimizer state, EMA and extra state follow, because the whole train state is traced.

Everything runs inside `use(mesh, rules)`. It enters the mesh with `jax.set_mesh`: inside the older `with mesh:` every
logical constraint is silently ignored, the results stay right and the batch is replicated on every device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm.errors import UserError, did_you_mean
from vlm.schema import MeshConfig, ShardingConfig

MESH_AXES = ("data", "fsdp", "tensor")
MeshAxes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, MeshAxes]]


# ------------------------------------------------------------------------------------------------------------ mesh


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each mesh axis, with -1 resolved.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise UserError(f"config.sharding.mesh: {config} does not fit {num_devices} devices")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all hosts; neighbouring tensor and fsdp positions share a host (or a TPU slice)."""
    grid = device_grid(config, jax.devices() if devices is None else devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [data, fsdp, tensor] in which the batch positions of every host are one run."""
    from jax.experimental import mesh_utils

    shape = tuple(mesh_shape(config, len(devices)).values())
    slices = {_place(device)[0] for device in devices}
    if devices[0].platform == "tpu" and len(slices) > 1 and shape[0] % len(slices) == 0:
        inner = (shape[0] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (len(slices), 1, 1), devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        ordered = sorted(devices, key=lambda device: (*_place(device), device.id))
        grid = np.asarray(ordered).reshape(shape)
    return group_by_host(grid)


def group_by_host(grid: np.ndarray) -> np.ndarray:
    """Reorders the batch positions of a grid [data, fsdp, tensor] so that those of every host are one run.

    A TPU's physical layout can interleave hosts along the data and fsdp axes (host 0 of a 4 x 4 x 4 slice would hold
    rows 0, 4, 16 and 20 of 64). Any order of the batch is as good, so positions are sorted by host, slice by slice
    whatever the hosts' numbers are; those of one host keep their physical order, and a host reads one run of rows.
    """
    positions = grid.reshape(-1, grid.shape[-1])
    first = [min(map(_place, devices)) for devices in positions]
    order = sorted(range(len(positions)), key=first.__getitem__)
    return positions[order].reshape(grid.shape)


def _place(device: Any) -> tuple[int, int]:
    """The slice (devices with fast links among them; one where the platform knows none) and the host of a device."""
    return getattr(device, "slice_index", None) or 0, device.process_index


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Makes `mesh` and `rules` current: constraints on logical axes now shape the compiled program.

    Raises:
      UserError: a rule that names an unknown mesh axis, or two rules for one logical axis.
      RuntimeError: constraints have no effect although they should.
    """
    check_rules(rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules)):
        assert_constraints_take_effect(mesh.size)
        yield


def without_constraints() -> contextlib.AbstractContextManager[None]:
    """Inside it, constraints on logical axes do nothing."""
    return nn.logical_axis_rules(())


def unbox(tree: Any) -> Any:
    """The arrays of a tree whose leaves carry their logical axes."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, nn.Partitioned) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def assert_constraints_take_effect(batch: int) -> None:
    """Traces one constraint and raises RuntimeError if the program does not contain it."""

    def probe(x: jax.Array) -> jax.Array:
        return nn.with_logical_constraint(x, ("batch",))

    traced = jax.make_jaxpr(probe)(jax.ShapeDtypeStruct((batch,), np.float32))
    if not any(equation.primitive.name == "sharding_constraint" for equation in traced.jaxpr.eqns):
        raise RuntimeError(
            "constraints on logical axes have no effect here, every device would hold the whole batch: "
            "enter the mesh with vlm.sharding.use, and map the axis 'batch' in config.sharding.rules"
        )


def check_rules(rules: Rules) -> None:
    """Refuses rules with unknown mesh axes and logical axes that are mapped twice."""
    seen: set[str] = set()
    for logical, axes in rules:
        for axis in _names(axes):
            if axis not in MESH_AXES:
                raise UserError(f"config.sharding.rules: {logical!r} -> {axis!r}{did_you_mean(axis, MESH_AXES)}")
        if logical in seen:
            raise UserError(f"config.sharding.rules: {logical!r} is mapped twice")
        seen.add(logical)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


# ------------------------------------------------------------------------------------------------------- placement


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one array is split: `spec` over the mesh, `replicated` says which dimension could not be and why."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: PartitionSpec
    shards: int
    replicated: str = ""

    @property
    def size_in_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        """Bytes that one device holds."""
        return self.size_in_bytes // self.shards


def place(abstract: Any, rules: Rules, sizes: Mapping[str, int]) -> Any:
    """Places every leaf of an abstract, boxed tree (`jax.eval_shape` of an initialiser).

    A leaf without logical axes is replicated. A dimension that its mesh axes do not divide is replicated too, and the
    placement says so.

    Args:
      sizes: devices along each mesh axis.

    Returns:
      The same tree without boxes; its leaves are `Placement`s.

    Raises:
      UserError: a logical axis without a rule, or an array that uses a mesh axis twice.
    """
    check_rules(rules)
    table = dict(rules)

    def one(path: Any, leaf: Any) -> Placement:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = tuple(leaf.names) if isinstance(leaf, nn.Partitioned) else ()
        value = leaf.value if isinstance(leaf, nn.Partitioned) else leaf
        shape, dtype = tuple(value.shape), value.dtype
        if len(axes) != len(shape):  # not declared, or a factored moment of another rank
            axes = (None,) * len(shape)
        split, shards, note = _split(name, shape, axes, table, sizes)
        itemsize = np.dtype(np.uint8) if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype)
        return Placement(name, shape, itemsize, PartitionSpec(*split), shards, note)

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def _split(
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    table: Mapping[str, MeshAxes],
    sizes: Mapping[str, int],
) -> tuple[list[MeshAxes], int, str]:
    split: list[MeshAxes] = []
    used: dict[str, str] = {}
    shards, notes = 1, []
    for size, logical in zip(shape, axes, strict=True):
        if logical is not None and logical not in table:
            raise UserError(
                f"{name}: no sharding rule for the logical axis {logical!r}{did_you_mean(logical, table)}; "
                "add it to config.sharding.rules"
            )
        mesh_axes = _names(table[logical]) if logical is not None else ()
        for axis in mesh_axes:
            if axis in used:
                raise UserError(
                    f"{name}: config.sharding.rules split both {used[axis]!r} and {logical!r} over mesh axis {axis!r}"
                )
            used[axis] = str(logical)
        ways = math.prod(sizes[axis] for axis in mesh_axes)
        if size % ways:
            notes.append(f"{logical}={size} is not divisible by {'*'.join(mesh_axes)}={ways}")
            split.append(None)
            continue
        shards *= ways
        split.append(table[logical] if logical is not None and mesh_axes else None)
    while split and split[-1] is None:  # as the compiler writes it
        split.pop()
    return split, shards, "; ".join(notes)


def named(placements: Any, mesh: Mesh) -> Any:
    """`NamedSharding`s on `mesh` for a tree of placements."""
    return jax.tree.map(lambda placement: NamedSharding(mesh, placement.spec), placements)


def abstract(placements: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and `NamedSharding`s of a tree of placements, for restoring it."""

    def one(placement: Placement) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(placement.shape, placement.dtype, sharding=NamedSharding(mesh, placement.spec))

    return jax.tree.map(one, placements)


def replicated(placements: Any) -> list[str]:
    """The arrays of a part of the state with a dimension that should be split and cannot be, each with the reason."""
    found = [placement for placement in jax.tree.leaves(placements) if placement.replicated]
    return [f"{placement.path.split('/', 1)[-1]}: {placement.replicated}" for placement in found]


def bytes_per_device(placements: Any) -> int:
    """Bytes that one device holds of the whole tree."""
    return sum(placement.bytes_per_device for placement in jax.tree.leaves(placements))


# ----------------------------------------------------------------------------------------------------------- batch


def batch_axes(rules: Rules) -> tuple[str, ...]:
    """The mesh axes that rows of a batch are split over, in training and in evaluation."""
    return _names(dict(rules).get("batch"))


def batch_spec(
    config: ShardingConfig,
    batch_size: int,
    sizes: Mapping[str, int],
    accumulation_steps: int = 1,
    pack_texts: int = 1,
) -> PartitionSpec:
    """How the leading axis of every array of a batch is split.

    Raises:
      UserError: the batch size is not a multiple of the devices it is split over, in every micro-batch; or texts are to
        be packed of more rows than a device has, or of a number that does not divide them.
    """
    axes = dict(config.rules).get("batch")
    ways = math.prod(sizes[axis] for axis in batch_axes(config.rules))
    if batch_size % (ways * accumulation_steps):
        micro = f" x {accumulation_steps} micro-batches" if accumulation_steps > 1 else ""
        raise UserError(f"config.data.batch_size: expected a multiple of {ways} devices{micro}, found {batch_size}")
    rows = batch_size // (ways * accumulation_steps)
    if rows % pack_texts:
        raise UserError(
            f"config.train.pack_texts: expected a divisor of the {rows} rows that a device has of a batch"
            f"{' (micro-batch)' if accumulation_steps > 1 else ''}, found {pack_texts}"
        )
    return PartitionSpec(axes)


def local_rows(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """The rows [start, stop) of the global batch that this host's devices hold and this host must read.

    Raises:
      UserError: see `host_rows`.
    """
    return _rows_of_hosts(sharding, batch_size)[jax.process_index()]


def reads_first(sharding: NamedSharding, batch_size: int) -> bool:
    """Whether this host is the first of those that share its rows."""
    return is_first(_rows_of_hosts(sharding, batch_size), jax.process_index())


def is_first(rows: Mapping[int, tuple[int, int]], host: int) -> bool:
    """Whether no host before this one has the same rows."""
    return host == min(other for other in rows if rows[other] == rows[host])


def _rows_of_hosts(sharding: NamedSharding, batch_size: int) -> dict[int, tuple[int, int]]:
    parts: dict[int, set[tuple[int, int]]] = {}
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        start, stop, _ = index[0].indices(batch_size) if index else (0, batch_size, 1)
        parts.setdefault(device.process_index, set()).add((start, stop))
    return host_rows(parts, batch_size)


def host_rows(parts: Mapping[int, set[tuple[int, int]]], batch_size: int) -> dict[int, tuple[int, int]]:
    """The rows [start, stop) of every host, from the row ranges that its devices hold.

    Hosts that share rows, because the tensor axis spans them, get the same rows.

    Raises:
      UserError: the rows of a host are not one run, or the runs are not equal parts of the batch.
    """
    rows = {}
    for host, ranges in sorted(parts.items()):
        start, stop = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        size = stop - start
        if sum(stop - start for start, stop in ranges) != size or batch_size % size or start % size:
            held = ", ".join(f"{start}-{stop}" for start, stop in sorted(ranges)[:4])
            raise UserError(
                f"config.sharding: expected every host to hold one equal run of the {batch_size} rows of a batch, "
                f"found rows {held} on host {host}; choose sizes of data, fsdp and tensor that divide, or are "
                "multiples of, the devices of a host"
            )
        rows[host] = start, stop
    if len({stop - start for start, stop in rows.values()}) > 1:
        raise UserError(f"config.sharding: expected the same number of rows on every host, found {rows}")
    return rows


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> dict[str, jax.Array]:
    """Puts this host's rows of a batch on its devices; together the hosts' rows form arrays of `batch_size` rows."""
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # one call for all arrays, some of which have a row for several
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }
