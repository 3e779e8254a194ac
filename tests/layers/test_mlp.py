"""Activations against PyTorch's definitions; the gated network against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm.layers import mlp

TORCH = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("name", sorted(mlp.ACTIVATIONS))
def test_activations(name):
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    np.testing.assert_allclose(mlp.ACTIVATIONS[name](jnp.asarray(x)), TORCH[name](torch.tensor(x)), atol=1e-6)


@pytest.mark.parametrize("name", sorted(mlp.ACTIVATIONS))
def test_activations_in_half_precision_keep_its_digits(name):
    x = jnp.linspace(-4, 4, 65).astype(jnp.bfloat16)
    exact = TORCH[name](torch.tensor(np.asarray(x, np.float32)))
    found = np.asarray(jax.jit(mlp.ACTIVATIONS[name])(x), np.float32)
    np.testing.assert_allclose(found, exact, rtol=0.03)


def test_gated():
    module = mlp.GatedMLP(mlp_dim=12)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    params = module.init(jax.random.key(1), x)["params"]
    gate, up, down = (params[name]["kernel"].value for name in ("gate", "up", "down"))
    np.testing.assert_allclose(
        module.apply({"params": params}, x), (jax.nn.silu(x @ gate) * (x @ up)) @ down, atol=1e-6
    )
