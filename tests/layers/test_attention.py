"""Attention against PyTorch's, and its invariants: masks, grouped heads, caches."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm.layers import attention, cache, masks, positions

from ..quick import apply, random_params


def _qkv(heads: int, kv_heads: int, length: int = 5, keys: int = 7, width: int = 8) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, width)]
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def _torch(query, key, value, mask=None) -> np.ndarray:
    q, k, v = (torch.tensor(x).transpose(1, 2) for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mask = None if mask is None else torch.tensor(np.asarray(mask))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).numpy()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["none", "padding", "shared", "per_head"])
@pytest.mark.parametrize("kernel", ["late", "blocked"])
def test_equals_pytorch(kv_heads, kind, kernel, monkeypatch):
    monkeypatch.setattr(attention, "attention_kernel", lambda *_, **__: kernel)
    query, key, value = _qkv(4, kv_heads)
    rng = np.random.default_rng(1)
    mask = {
        "none": None,
        "padding": masks.padding_mask(jnp.array([[1] * 7, [1] * 4 + [0] * 3], bool)),
        "shared": masks.causal_mask(7)[:, :, 2:],
        "per_head": jnp.asarray(rng.random((2, 4, 5, 7)) < 0.6).at[..., 0].set(True),
    }[kind]
    found = attention.dot_product_attention(query, key, value, mask)
    expected = _torch(query, key, value, None if mask is None else np.broadcast_to(mask, (2, 4, 5, 7)))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    weights = attention.attention_weights(query, key, mask)
    mixed = np.einsum("bhlm,bmhd->blhd", weights, np.repeat(value, 4 // kv_heads, axis=2))
    np.testing.assert_allclose(mixed, expected, atol=2e-6)


def test_formulations_agree_in_value_and_gradient(monkeypatch):
    query, key, value = _qkv(4, 2)
    mask = masks.padding_mask(jnp.array([[1] * 7, [1] * 4 + [0] * 3], bool))

    def total(kernel):
        monkeypatch.setattr(attention, "attention_kernel", lambda *_, **__: kernel)
        f = lambda *x: jnp.square(attention.dot_product_attention(*x, mask)).sum()  # noqa: E731
        return jax.value_and_grad(f, argnums=(0, 1, 2))(query, key, value)

    late, blocked, xla = total("late"), total("blocked"), total("xla")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), late, xla)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), blocked, xla)


def test_many_scores_are_blocked_on_one_cpu_and_not_kept_for_the_gradient():
    query, key, value = (jax.ShapeDtypeStruct((16, length, 4, 16), jnp.float32) for length in (400, 410, 410))
    bytes_of_scores = 16 * 4 * 400 * 410 * 4

    def temporaries(*axes):
        gradient = jax.jit(jax.grad(lambda *x: attention.dot_product_attention(*x).sum(), argnums=(0, 1, 2)))
        with (
            jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)))
            if axes
            else (contextlib.nullcontext())
        ):
            return gradient.lower(query, key, value).compile().memory_analysis().temp_size_in_bytes

    assert temporaries() < bytes_of_scores < temporaries("data")


def test_rows_without_keys_are_finite_and_large_scores_do_not_overflow():
    query, key, value = _qkv(2, 2)
    nothing = jnp.zeros((2, 1, 1, 7), bool)
    uniform = attention.dot_product_attention(query, key, value, nothing)
    np.testing.assert_allclose(uniform, np.broadcast_to(value.mean(1, keepdims=True), uniform.shape), atol=1e-6)
    assert np.isfinite(attention.dot_product_attention(1e4 * query, 1e4 * key, value)).all()
    gradient = jax.grad(lambda q: attention.dot_product_attention(q, key, value, nothing).sum())(query)
    assert np.isfinite(gradient).all()


def test_kernel_choice():
    def choice(backend, dtype, head_dim, masked, scores=12 * 577 * 577, devices=1):
        return attention.attention_kernel(backend, dtype, head_dim, masked=masked, scores=scores, devices=devices)

    assert choice("cpu", jnp.float32, 64, True) == "blocked"
    assert choice("cpu", jnp.float32, 64, True, devices=8) == "late"  # a loop over examples would gather them
    assert choice("cpu", jnp.float32, 64, True, scores=12 * 197 * 197) == "blocked"
    assert choice("cpu", jnp.float32, 64, True, scores=12 * 35 * 35) == "late"
    assert choice("gpu", jnp.bfloat16, 64, False) == "cudnn"
    assert choice("gpu", jnp.bfloat16, 64, True) == "xla"
    assert choice("gpu", jnp.float32, 64, False) == "late"  # exact
    assert choice("tpu", jnp.bfloat16, 128, False) == "xla"


@pytest.mark.parametrize("qk_norm", [None, "rms", "layer"])
def test_cached_steps_equal_the_full_pass(qk_norm):
    """Prefill of three positions, then one at a time, gives what one causal pass over all gives."""
    module = attention.Attention(num_heads=4, head_dim=8, num_kv_heads=2, qk_norm=qk_norm)
    x = jax.random.normal(jax.random.key(0), (2, 6, 32))
    params = {"params": random_params(module, x)}

    @jax.jit
    def run(part, where, mask, buffer):
        return module.apply(params, part, mask, rotary=positions.rotary_tables(where, 8), cache=buffer)

    full, _, _ = run(x, jnp.broadcast_to(jnp.arange(6), (2, 6)), masks.causal_mask(6), None)
    buffer = cache.Cache.constant(*jnp.zeros((2, 2, 0, 2, 8))).reserve(9)
    outputs = []
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 6)]:
        where = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        mask = (jnp.arange(9)[None] <= jnp.arange(start, stop)[:, None])[None, None]
        output, buffer, _ = run(x[:, start:stop], where, mask, buffer)
        outputs.append(output)
    assert int(buffer.index) == 6
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)


def test_cross_attention_with_projected_keys_and_values():
    module = attention.Attention(num_heads=4, head_dim=8, out_features=16)
    x, context = jax.random.normal(jax.random.key(0), (2, 3, 16)), jax.random.normal(jax.random.key(1), (2, 5, 24))
    params = random_params(module, x, context=context)
    output, keys_values, weights = apply(module, params, x, context=context, output_attentions=True)
    assert output.shape == (2, 3, 16) and weights.shape == (2, 4, 3, 5)
    again, _, _ = apply(module, params, x, keys_values=keys_values)
    np.testing.assert_allclose(again, output, atol=1e-6)


def test_attention_dropout_keeps_the_expectation():
    module = attention.Attention(num_heads=2, head_dim=4, dropout_rate=0.5)
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    params = {"params": random_params(module, x)}
    plain = jax.jit(module.apply)(params, x)[0]
    keys = jax.random.split(jax.random.key(2), 4000)
    run = lambda key: module.apply(params, x, deterministic=False, rngs={"dropout": key})[0]  # noqa: E731
    dropped = jax.jit(jax.vmap(run))(keys)
    assert np.abs(dropped[0] - plain).max() > 1e-3
    np.testing.assert_allclose(dropped.mean(0), plain, atol=5 * float(dropped.std() / 4000**0.5) + 1e-4)


def test_reading_a_context_for_decoding_gives_no_weights():
    x = jnp.ones((2, 3, 8))
    layer = attention.Attention(2, 4, fused=True)
    for flags in ({"output_attentions": True}, {"offset": jnp.zeros((2, 2, 3, 3))}):
        with pytest.raises(ValueError, match="while decoding, expected neither output_attentions nor an offset"):
            layer.init(jax.random.key(0), x, context=x, **flags)
