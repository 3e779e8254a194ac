"""Masks are the matrices their docstrings draw, and causality holds through gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from vlm.layers import attention, masks


def test_matrices():
    np.testing.assert_array_equal(masks.padding_mask(jnp.array([[1, 1, 1, 0]], bool))[0, 0], [[1, 1, 1, 0]])
    np.testing.assert_array_equal(masks.causal_mask(3)[0, 0], np.tri(3))
    np.testing.assert_array_equal(masks.causal_mask(2, 4)[0, 0], [[1, 1, 1, 0], [1, 1, 1, 1]])


def test_causal_outputs_have_no_gradient_to_later_inputs():
    x = jax.random.normal(jax.random.key(0), (1, 6, 1, 4))

    def at(position, x):
        return attention.dot_product_attention(x, x, x, masks.causal_mask(6))[0, position].sum()

    for position in range(6):
        gradient = np.abs(jax.grad(lambda x, p=position: at(p, x))(x))[0, :, 0].max(-1)
        assert np.all(gradient[position + 1 :] == 0) and np.all(gradient[: position + 1] > 0)
