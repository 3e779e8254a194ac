"""Losses against their formulas, and the sharded contrastive forms against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm import losses

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 4, 1), (1, 1, 8)]


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def reference(image, text, scale):
    """InfoNCE in float64, without any trick."""
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    s = scale * image @ text.T
    rows = np.log(np.exp(s).sum(1)) - np.diag(s)
    columns = np.log(np.exp(s).sum(0)) - np.diag(s)
    return (rows.mean() + columns.mean()) / 2


def mesh_of(shape):
    grid = np.asarray(jax.devices()[:8]).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def plain(image, text, scale):
    logits = scale * jnp.dot(image.astype(jnp.float32), text.astype(jnp.float32).T)
    labels = jnp.arange(len(image))
    return (losses.cross_entropy(logits, labels) + losses.cross_entropy(logits.T, labels)) / 2


@functools.cache
def case(dtype="float32", size=32):
    rng = np.random.default_rng(0)
    image, text = unit(rng, size, 12), unit(rng, size, 12)
    arrays = (jnp.asarray(image, dtype), jnp.asarray(text, dtype), jnp.float32(20.0))
    value, gradients = jax.jit(jax.value_and_grad(lambda *a: 3.0 * plain(*a), argnums=(0, 1, 2)))(*arrays)
    return arrays, value, gradients


@pytest.mark.parametrize("form", ["rows", "ring"])
def test_one_device_equals_the_formula(form):
    (image, text, scale), _, _ = case()
    value = losses.contrastive(image, text, scale, form=form)
    np.testing.assert_allclose(value, reference(image, text, 20.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["rows", "ring"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sharded_equals_one_device(shape, form, dtype, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_ROWS", 2)
    arrays, expected, gradients = case(dtype)
    mesh = mesh_of(shape)
    split, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())

    def loss(*a):
        return 3.0 * losses.contrastive(*a, form=form)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, s) for x, s in zip(arrays, (split, split, whole), strict=True)]
        value, found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*placed)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        # bfloat16 gradients differ by one rounding of the result (2⁻⁸) at most.
        assert np.abs(ours - theirs).max() <= {"float32": 2e-6, "bfloat16": 8e-3}[dtype] * np.abs(theirs).max()


def weighted(image, text, scale, shares, candidates):
    """Every pair's rows and columns of logits, weighted; what is compared with may be a constant."""
    fixed = (lambda x: x) if candidates else jax.lax.stop_gradient
    per_image, per_text = scale * jnp.dot(image, fixed(text).T), scale * jnp.dot(text, fixed(image).T)
    labels = jnp.arange(len(image))
    return sum(jnp.sum(shares * losses.token_losses(logits, labels)) / 2 for logits in (per_image, per_text))


@pytest.mark.parametrize("candidates", [True, False])
@pytest.mark.parametrize("form", ["rows", "ring"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 1)], ids=str)
def test_weighted_pairs_and_constant_candidates(shape, form, candidates, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_ROWS", 2)
    arrays, _, _ = case()
    shares = np.random.default_rng(1).random(32).astype(np.float32)
    shares[[3, 17]] = 0
    expected = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)), static_argnums=4)(*arrays, shares, candidates)

    def loss(*a):
        return losses.contrastive(*a, weights=shares, candidate_gradients=candidates, form=form)

    grid = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    with jax.set_mesh(Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6 * np.abs(theirs).max())


def compiled(form, batch, width=16):
    mesh = mesh_of((2, 2, 2))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    embeds = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=split)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    step = jax.value_and_grad(functools.partial(losses.contrastive, form=form), argnums=(0, 1, 2))
    with jax.set_mesh(mesh):
        return jax.jit(step).lower(embeds, embeds, scale).compile()


@pytest.mark.parametrize(("form", "batch", "bound"), [("rows", 32_768, 2.2 / 8), ("ring", 131_072, 0.6 / 64)])
def test_no_device_holds_all_logits(form, batch, bound):
    """Shares of the B x B logits: rows twice B²/n, ring parts of one (B/n)² block, also in the backward pass."""
    assert compiled(form, batch).memory_analysis().temp_size_in_bytes < bound * batch * batch * 4


def test_auto_form_follows_the_batch_size(monkeypatch):
    monkeypatch.setattr(losses, "RING_FROM", 32)
    assert "collective-permute" in compiled("auto", 32).as_text()
    assert "collective-permute" not in compiled("auto", 24).as_text()


def test_a_batch_that_does_not_divide_uses_fewer_axes():
    (image, text, scale), _, _ = case(size=6)
    with jax.set_mesh(mesh_of((2, 2, 2))):
        value = jax.jit(losses.contrastive)(image, text, scale)
    np.testing.assert_allclose(value, reference(image, text, 20.0), rtol=1e-6)


def test_inside_shard_map_is_refused():
    (image, text, scale), _, _ = case()
    spec = PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(mesh_of((8, 1, 1))), pytest.raises(ValueError, match="outside jax.shard_map"):
        jax.shard_map(
            losses.contrastive, in_specs=(spec, spec, PartitionSpec()), out_specs=PartitionSpec(), check_vma=False
        )(image, text, scale)


def test_mean_squared_error_is_the_mean_over_everything():
    prediction, target = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[1.0, 0.0], [0.0, 4.0]])
    assert losses.mean_squared_error(prediction, target) == (4 + 9) / 4
    assert losses.mean_squared_error(prediction.astype(jnp.bfloat16), target).dtype == jnp.float32


def test_cross_entropy_ignores_labels():
    logits = jnp.asarray([[2.0, 0.0, -1.0], [5.0, 5.0, 5.0], [0.0, 1.0, 0.0]])
    labels = jnp.asarray([0, -100, 2])
    expected = -(np.log(np.exp(2) / (np.exp(2) + 1 + np.exp(-1))) + np.log(1 / (2 + np.e))) / 2
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)
    assert losses.cross_entropy(logits, jnp.full(3, -100)) == 0.0
    gradient = jax.grad(lambda x: losses.cross_entropy(x, labels))(logits)
    assert not np.any(np.asarray(gradient)[1])


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunked_cross_entropy_equals_full(chunk):
    rng = np.random.default_rng(1)
    hidden, kernel = jnp.asarray(rng.normal(size=(10, 6)), jnp.float32), jnp.asarray(rng.normal(size=(6, 9)))
    kernel = kernel.astype(jnp.float32)
    labels = jnp.asarray([1, -100, 3, 8, 0, -100, 2, 2, 5, 7])

    def full(h, k):
        return losses.cross_entropy(h @ k, labels)

    def pieces(h, k):
        return losses.chunked_cross_entropy(h, lambda rows: rows @ k, labels, chunk=chunk)

    expected, d_expected = jax.value_and_grad(full, argnums=(0, 1))(hidden, kernel)
    value, d_value = jax.value_and_grad(pieces, argnums=(0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(d_value, d_expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
