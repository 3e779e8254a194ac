"""Norms against PyTorch, on inputs where one-pass variance fails."""

import jax
import numpy as np
import pytest
import torch

from vlm.layers import norms


@pytest.mark.parametrize(("mean", "std", "eps"), [(0, 1, 1e-5), (50, 1, 1e-12), (5, 1e-2, 1e-12), (1000, 1, 1e-6)])
def test_layer_norm_on_shifted_inputs(mean, std, eps):
    rng = np.random.default_rng(0)
    x = (mean + std * rng.normal(size=(4, 96))).astype(np.float32)
    scale, bias = rng.normal(size=(2, 96)).astype(np.float32)
    found = norms.LayerNorm(eps).apply({"params": {"scale": scale, "bias": bias}}, x)
    wide = [torch.tensor(a, dtype=torch.float64) for a in (x, scale, bias)]
    expected = torch.nn.functional.layer_norm(wide[0], (96,), wide[1], wide[2], eps).numpy()
    rounding = 2.0**-24 * mean / std  # of the mean itself, in units of the result; one-pass variance: its square
    np.testing.assert_allclose(found, expected, atol=2e-6 + 6 * np.abs(scale).max() * rounding)


def test_rms_norm_and_dtype():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(4, 32)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    found = norms.RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (32,), torch.tensor(scale), 1e-6).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = norms.LayerNorm(1e-5, "bfloat16")
    params = half.init(jax.random.key(0), x)["params"]
    assert half.apply({"params": params}, x).dtype == "bfloat16"
    assert {leaf.value.dtype for leaf in params.values()} == {np.dtype("float32")}
