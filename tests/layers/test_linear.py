"""The product behind every Linear: its own derivative, and what it keeps for it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from vlm import sharding
from vlm.layers.linear import FEW_ROWS, Embedding, matmul, transposed_matmul
from vlm.schema import MeshConfig, ShardingConfig

from ..quick import no_array_is_gathered_for_want_of_a_layout


@pytest.mark.parametrize("width", [6, 2048, 2056])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (2, 3, 4)])
def test_value_and_gradients_equal_autodiff_of_dot(rows, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*rows, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, 4)) / np.sqrt(width), jnp.float32)
    weight = rng.normal(size=(*rows, 4)).astype(np.float32)

    def objective(product):
        return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)) * weight)

    ours = jax.jit(jax.value_and_grad(objective(matmul), argnums=(0, 1)))(x, kernel)
    theirs = jax.jit(jax.value_and_grad(objective(jnp.dot), argnums=(0, 1)))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_kernel_gradient_is_one_product_without_transposes():
    x, kernel = jnp.ones((2, 3, 6)), jnp.ones((6, 4))
    program = str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(matmul(x, k))))(kernel))
    assert program.count("dot_general[") == 2 and "transpose[" not in program
    assert "transpose[" in str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(jnp.dot(x, k))))(kernel))


def test_wide_activations_are_kept_in_blocks_of_columns_on_one_cpu_only():
    x, kernel = jnp.ones((2, 3, 2048)), jnp.ones((2048, 4))

    def program():
        return str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(matmul(x, k))))(kernel))

    assert "f32[128,6,16]" in program()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("data",))):
        assert "f32[128,6,16]" not in program()


def test_a_frozen_kernel_keeps_no_activations(capsys):
    def layer(x, frozen):
        return jnp.sum(matmul(matmul(x, frozen), frozen))

    print_saved_residuals(jax.checkpoint(layer, policy=jax.checkpoint_policies.everything_saveable), jnp.ones((3, 6)),
                          jnp.ones((6, 6)))  # fmt: skip
    both = capsys.readouterr().out
    frozen = jnp.ones((6, 6))
    print_saved_residuals(lambda x: layer(x, frozen), jnp.ones((3, 6)))
    assert "f32[3,6]" in both and "f32[3,6]" not in capsys.readouterr().out


def test_an_unused_result_has_zero_gradients():
    def objective(x, kernel):
        return jnp.sum(x) + 0.0 * jnp.sum(jax.lax.stop_gradient(matmul(x, kernel)))

    into_x, into_kernel = jax.grad(objective, argnums=(0, 1))(jnp.ones((2, 3)), jnp.ones((3, 4)))
    assert (into_x == 1).all() and (into_kernel == 0).all()


@pytest.mark.parametrize("axes", [("vocab", "embed"), ("position", "embed")])
@pytest.mark.parametrize(("rows", "exchanged"), [(6, False), (64, True)])
@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)])
def test_lookup_in_a_split_table(mesh, rows, exchanged, axes, capfd):
    """A small table is gathered, rows of a large one are exchanged; never the whole batch."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(rows, 16)), jnp.float32)
    ids, weight = rng.integers(0, rows, (16, 5)), rng.normal(size=(16, 5, 16)).astype(np.float32)
    module, rules = Embedding(rows, 16, axes), ShardingConfig().rules

    def objective(table, ids):
        found = module.apply({"params": {"embedding": table}}, ids)
        return jnp.sum(jnp.tanh(found) * weight), found

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, expected), expected_gradient = run(table, ids)
    grid = sharding.make_mesh(MeshConfig(*mesh))
    with sharding.use(grid, rules):
        split = jax.sharding.NamedSharding(grid, jax.sharding.PartitionSpec(("data", "fsdp")))
        names = jax.sharding.PartitionSpec(*(dict(rules)[axis] for axis in axes))
        where = jax.sharding.NamedSharding(grid, names)
        inputs = jax.device_put(table, where), jax.device_put(ids, split)
        compiled = (
            jax.jit(jax.value_and_grad(objective, has_aux=True), out_shardings=((None, split), where))
            .lower(*inputs)
            .compile()
        )
        (_, found), gradient = compiled(*inputs)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert ("all-to-all" in compiled.as_text()) == exchanged
    assert not re.search(r"= f32\[16,5,16\]\S* all-gather\(", compiled.as_text())
    no_array_is_gathered_for_want_of_a_layout(capfd)


def test_lookup_of_rows_that_the_devices_do_not_divide():
    """They read the table where it lies, as those of a batch that is split."""
    table, ids = jnp.asarray(np.random.default_rng(0).normal(size=(64, 16)), jnp.float32), np.array([[3, 60, 3]])
    grid = sharding.make_mesh(MeshConfig(2, 4, 1))
    with sharding.use(grid, ShardingConfig().rules):
        split = jax.sharding.NamedSharding(grid, jax.sharding.PartitionSpec(None, "fsdp"))
        look_up = jax.jit(lambda table, ids: Embedding(64, 16).apply({"params": {"embedding": table}}, ids))
        compiled = look_up.lower(jax.device_put(table, split), ids).compile()
        np.testing.assert_array_equal(compiled(jax.device_put(table, split), ids), table[ids])
    assert not re.search(r"= f32\[64,16\]\S* all-gather\(", compiled.as_text())


@pytest.mark.parametrize("rows", [3, FEW_ROWS, FEW_ROWS + 1])
def test_a_transposed_kernel_is_read_as_it_lies_for_few_rows(rows):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 1, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)
    product = jax.jit(lambda x, kernel: transposed_matmul(x, kernel) + 1.0)
    np.testing.assert_allclose(product(x, kernel), x @ kernel.T + 1.0, rtol=1e-5, atol=1e-5)
    program = product.lower(x, kernel).compile().as_text()
    assert re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program) == [f"40,{rows}" if rows <= FEW_ROWS else f"{rows},40"]
