"""The product behind every Linear: its own derivative, and what it keeps for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from vlm.layers.linear import matmul


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
