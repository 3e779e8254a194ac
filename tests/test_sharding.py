"""Meshes, placement of boxed trees, and the trap in which logical constraints do nothing."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
    (odd,) = sharding.replicated(placed)
    assert odd.path == "odd" and odd.replicated == "embed=7 is not divisible by fsdp=2"
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
