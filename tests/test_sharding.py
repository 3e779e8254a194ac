"""Meshes, placement of boxed trees, and the trap in which logical constraints do nothing."""

import collections
import dataclasses
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from vlm import sharding
from vlm.errors import UserError
from vlm.layers.linear import constrain
from vlm.schema import MeshConfig, ShardingConfig

RULES = ShardingConfig().rules
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def boxed(shape, *axes, dtype=jnp.float32):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), axes)


def test_mesh_shape():
    assert sharding.mesh_shape(MeshConfig(), 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.mesh_shape(MeshConfig(2, -1, 2), 8) == SIZES
    for config in (MeshConfig(3, 1, 1), MeshConfig(-1, 3, 1), MeshConfig(16, 1, 1), MeshConfig(1, 1, 1)):
        with pytest.raises(UserError, match="does not fit 8 devices"):
            sharding.mesh_shape(config, 8)


def test_mesh_axes_are_automatic_and_tensor_neighbours_are_adjacent():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    assert dict(mesh.shape) == SIZES and set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert [d.id for d in mesh.devices[1, 0]] == [4, 5]


@dataclasses.dataclass(frozen=True)
class TpuCore:
    """One chip of a v4 slice of 4x4x4: a host has 2x2x1 of them."""

    id: int
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def coords(self):
        return self.id % 4, self.id // 4 % 4, self.id % 64 // 16

    @property
    def process_index(self):
        x, y, z = self.coords
        return self.slice_index * 16 + x // 2 + y // 2 * 2 + z * 4


def rows_of_hosts(grid, batch_size):
    """Row ranges per host of a batch split over (data, fsdp), as `NamedSharding` splits it."""
    positions = grid.reshape(-1, grid.shape[-1])
    step, parts = batch_size // len(positions), {}
    for row, devices in enumerate(positions):
        for device in devices:
            parts.setdefault(device.process_index, set()).add((row * step, (row + 1) * step))
    return sharding.host_rows(parts, batch_size)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (4, 1), (8, 1), (1, 4), (4, 4)])
def test_hosts_of_a_tpu_hold_one_run_of_rows_each(fsdp, tensor, slices):
    devices = [TpuCore(i, i // 64) for i in range(64 * slices)]
    grid = sharding.device_grid(MeshConfig(-1, fsdp, tensor), devices)
    assert grid.shape == (64 * slices // fsdp // tensor, fsdp, tensor) and set(grid.flat) == set(devices)
    rows = rows_of_hosts(grid, 256)
    assert len(rows) == 16 * slices
    counts = collections.Counter(rows.values())
    assert sorted(counts) == [(i, i + 256 // len(counts)) for i in range(0, 256, 256 // len(counts))]
    if tensor == 1:
        assert len(counts) == 16 * slices
    for part, half in enumerate(np.split(grid, slices)):  # only the data axis crosses slices
        assert {device.slice_index for device in half.flat} == {part}


@dataclasses.dataclass(frozen=True)
class InterleavedCore(TpuCore):
    """Two slices whose hosts were numbered in turns: even ones in the first slice, odd ones in the second."""

    @property
    def process_index(self):
        return TpuCore(self.id % 64).process_index * 2 + self.slice_index


@pytest.mark.parametrize(("fsdp", "tensor"), [(1, 1), (8, 1), (64, 1), (1, 4), (4, 4)])
def test_slices_stay_together_whatever_their_hosts_are_numbered(fsdp, tensor):
    devices = [InterleavedCore(i, i // 64) for i in range(128)]
    grid = sharding.device_grid(MeshConfig(-1, fsdp, tensor), devices)
    assert set(grid.flat) == set(devices)
    for part, half in enumerate(np.split(grid, 2)):
        assert {device.slice_index for device in half.flat} == {part}
    rows = rows_of_hosts(grid, 256)
    assert len(rows) == 32
    assert {host % 2 for host, (start, _) in rows.items() if start < 128} == {0}


def test_other_platforms_go_slice_by_slice_too_where_they_have_some():
    gpus = [types.SimpleNamespace(platform="gpu", process_index=i // 2, slice_index=i // 2 % 2, id=i) for i in range(8)]
    grid = sharding.device_grid(MeshConfig(-1, 4, 1), gpus)
    assert [[device.id for device in row] for row in grid[..., 0]] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for gpu in gpus:
        gpu.slice_index = None
    assert [device.id for device in sharding.device_grid(MeshConfig(-1, 4, 1), gpus[::-1]).flat] == list(range(8))


def test_evaluation_splits_batches_over_the_axes_of_training():
    assert sharding.batch_axes(ShardingConfig().rules) == ("data", "fsdp")
    assert sharding.batch_axes((("batch", "data"), ("embed", "fsdp"))) == ("data",)
    assert sharding.batch_axes((("batch", None),)) == ()


def test_the_torus_order_alone_scatters_the_rows_of_a_host():
    scattered = mesh_utils.create_device_mesh((64, 1, 1), [TpuCore(i) for i in range(64)])
    with pytest.raises(UserError, match="one equal run of the 64 rows of a batch, found rows .* on host 0"):
        rows_of_hosts(scattered, 64)
    assert rows_of_hosts(sharding.group_by_host(scattered), 64)[0] == (0, 4)


def test_hosts_may_share_rows_but_not_overlap_in_part():
    shared = {0: {(0, 4)}, 1: {(0, 4)}, 2: {(4, 8)}, 3: {(4, 8)}}
    rows = sharding.host_rows(shared, 8)
    assert rows == {0: (0, 4), 1: (0, 4), 2: (4, 8), 3: (4, 8)}
    assert [sharding.is_first(rows, host) for host in rows] == [True, False, True, False]
    for wrong in ({0: {(0, 2), (2, 4)}, 1: {(2, 4), (4, 6)}}, {0: {(0, 4)}, 1: {(4, 6)}}, {0: {(0, 1), (3, 4)}}):
        with pytest.raises(UserError, match=r"config\.sharding: expected"):
            sharding.host_rows(wrong, 8)


def test_every_leaf_follows_its_logical_axes_and_indivisible_dimensions_are_reported():
    tree = {
        "kernel": boxed((4, 8, 6), "layers", "embed", "mlp"),
        "odd": boxed((7, 6), "embed", "mlp"),
        "plain": jax.ShapeDtypeStruct((3,), jnp.int32),
    }
    placed = sharding.place(tree, RULES, SIZES)
    assert placed["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert placed["kernel"].size_in_bytes == 4 * 8 * 6 * 4 and placed["kernel"].bytes_per_device == 4 * 8 * 6
    assert placed["odd"].spec == PartitionSpec(None, "tensor")
    assert placed["plain"].spec == PartitionSpec() and placed["plain"].bytes_per_device == 12
    assert placed["odd"].replicated == "embed=7 is not divisible by fsdp=2"
    assert sharding.replicated(placed) == [f"odd: {placed['odd'].replicated}"]
    assert sharding.bytes_per_device(placed) == 192 + 84 + 12


def test_optimizer_state_follows_the_parameters():
    params = {"kernel": boxed((8, 6), "embed", "mlp")}
    state = jax.eval_shape(optax.scale_by_adam().init, params)
    placed = sharding.place(state, RULES, SIZES)
    assert placed.mu["kernel"].spec == placed.nu["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert placed.count.spec == PartitionSpec() and placed.mu["kernel"].path == "mu/kernel"
    factored = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=2).init, params)
    assert sharding.place(factored, RULES, SIZES).v_row["kernel"].spec == PartitionSpec()


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (boxed((8, 8), "embed", "mpl"), "a: no sharding rule for the logical axis 'mpl'; did you mean 'mlp'?"),
        (boxed((8, 8), "heads", "mlp"), "a: .* split both 'heads' and 'mlp' over mesh axis 'tensor'"),
    ],
)
def test_unmapped_and_doubly_used_axes_are_refused(leaf, message):
    with pytest.raises(UserError, match=message):
        sharding.place({"a": leaf}, RULES, SIZES)


def test_wrong_rules_are_refused():
    with pytest.raises(UserError, match="'embed' -> 'fdsp'; did you mean 'fsdp'"):
        sharding.check_rules((("embed", "fdsp"),))
    with pytest.raises(UserError, match="'embed' is mapped twice"):
        sharding.check_rules((("embed", "fsdp"), ("embed", None)))


def test_constraints_shape_the_compiled_program():
    """The activation of one device has B / 8 rows; were constraints ignored, it would have all B."""
    mesh = sharding.make_mesh(MeshConfig())
    batch = 64

    def program(x):
        return nn.with_logical_constraint(jnp.sin(jnp.outer(x, x)), ("batch", None)).sum()

    replicated = NamedSharding(mesh, PartitionSpec())
    with sharding.use(mesh, RULES):
        x = jax.device_put(np.ones(batch, np.float32), replicated)
        text = jax.jit(program).lower(x).compile().as_text()
    assert f"f32[{batch // 8},{batch}]" in text and f"f32[{batch},{batch}]" not in text


def test_constraints_leave_indivisible_dimensions_whole_and_refuse_unknown_axes():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    with sharding.use(mesh, RULES):
        split = jax.jit(lambda x: constrain(x, "batch", "mlp_activation"))(jnp.ones((8, 7)))
        assert split.sharding.spec == PartitionSpec(("data", "fsdp"))
        with pytest.raises(ValueError, match="did not match a rule"):
            jax.jit(lambda x: constrain(x, "batch", "mpl"))(jnp.ones((8, 8)))
        with pytest.raises(ValueError, match="did not match a rule"):
            jax.jit(lambda x: constrain(x, "batch", "embed"))(jnp.ones((8, 8)))
    np.testing.assert_array_equal(constrain(jnp.ones(3), "no mesh, no rules"), jnp.ones(3))


def test_the_guard_fails_where_constraints_are_ignored():
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(RuntimeError, match="have no effect"):
        sharding.assert_constraints_take_effect(8)
    with (
        pytest.warns(DeprecationWarning, match="with mesh"),
        mesh,
        nn.logical_axis_rules(RULES),
        pytest.raises(RuntimeError, match="have no effect"),
    ):
        sharding.assert_constraints_take_effect(8)
    with jax.set_mesh(mesh), pytest.raises(RuntimeError, match="have no effect"):
        sharding.assert_constraints_take_effect(8)
    with sharding.use(mesh, RULES), sharding.without_constraints(), pytest.raises(RuntimeError):
        sharding.assert_constraints_take_effect(8)


def test_batches():
    config = ShardingConfig()
    with pytest.raises(UserError, match="batch_size: expected a multiple of 4 devices, found 6"):
        sharding.batch_spec(config, 6, SIZES)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    split = NamedSharding(mesh, sharding.batch_spec(config, 8, SIZES))
    assert sharding.local_rows(split, 8) == (0, 8)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    (array,) = sharding.put_batch({"rows": rows}, split, 8).values()
    assert array.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(array, rows)


def test_every_micro_batch_must_divide_over_the_devices():
    sizes = {"data": 4, "fsdp": 1, "tensor": 1}
    assert sharding.batch_spec(ShardingConfig(), 16, sizes, 4) == sharding.batch_spec(ShardingConfig(), 16, sizes)
    with pytest.raises(UserError, match="multiple of 4 devices x 3 micro-batches, found 16"):
        sharding.batch_spec(ShardingConfig(), 16, sizes, 3)
    assert sharding.batch_spec(ShardingConfig(), 16, sizes, 1, 2) == sharding.batch_spec(ShardingConfig(), 16, sizes)
    with pytest.raises(UserError, match=r"pack_texts: expected a divisor of the 4 rows .* \(micro-batch\), found 8"):
        sharding.batch_spec(ShardingConfig(), 64, sizes, 4, 8)
