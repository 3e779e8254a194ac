"""FLOPs of traced programs against hand counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from vlm import sharding
from vlm.flops import count_flops, peak_flops
from vlm.schema import MeshConfig

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 8


def flops(function, *arguments):
    return count_flops(jax.make_jaxpr(function)(*arguments))


def test_products_loops_and_branches():
    assert flops(jnp.dot, X, W) == PRODUCT
    assert flops(lambda x, w: jnp.einsum("bi,io->bo", x, w) + 1, X, W) == PRODUCT

    def scanned(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=10)[0]

    assert flops(scanned, X, W) == 10 * PRODUCT
    assert flops(jax.jit(scanned), X, W) == 10 * PRODUCT
    gradient = jax.grad(lambda w, x: scanned(x, w).sum())
    assert flops(gradient, W, X) == 30 * PRODUCT
    assert flops(lambda x, w: jax.lax.cond(True, lambda: x @ w, lambda: x), X, W) == PRODUCT
    recomputed = jax.grad(lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w))(w, x).sum())
    assert flops(recomputed, W, X) >= 6 * PRODUCT


def test_convolutions():
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops(convolve, image, kernel) == 2 * (2 * 4 * 4 * 5) * (2 * 2 * 3)


def test_a_program_per_device_counts_once_per_device():
    mesh = sharding.make_mesh(MeshConfig())
    split = PartitionSpec("data")
    local = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split)
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    assert flops(local, x, W) == 4 * PRODUCT


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_unknown_devices_have_no_peak():
    assert peak_flops("cpu") is None
