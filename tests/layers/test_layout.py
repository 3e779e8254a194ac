"""A stack laid out for decoding computes what the scanned stack computes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.errors import UserError
from vlm.layers import masks, positions
from vlm.layers.cache import DecoderCache
from vlm.layers.layout import decoding_layout, unstacked_layers
from vlm.layers.transformer import TransformerBlock, scan_layers

LLAMA = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 24, "activation": "silu", "norm_eps": 1e-6}
LLAMA |= {"norm": "rms", "gated_mlp": True, "qkv_bias": True, "out_bias": False, "mlp_bias": True}


@partial(jax.jit, static_argnums=0)
def _apply(fused, params, *arguments):
    return Stack(fused).apply({"params": params}, *arguments)


class Stack(nn.Module):
    fused: bool = False

    @nn.compact
    def __call__(self, x, mask, rotary, caches=None):
        block = partial(TransformerBlock, **LLAMA)
        if self.fused:
            return unstacked_layers(partial(block, fused=True), 2, x, mask, rotary, caches=caches)
        return scan_layers(block, 2, x, mask, rotary).hidden


@pytest.fixture(scope="module")
def stack():
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    rotary = positions.rotary_tables(jnp.broadcast_to(jnp.arange(6), (2, 6)), 4)
    params = nn.unbox(jax.jit(Stack().init)(jax.random.key(1), x, masks.causal_mask(6), rotary))["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), params)
    full = _apply(False, params, x, masks.causal_mask(6), rotary)
    laid_out = decoding_layout({"a": {"b": params}, "c": 1}, {"a/b": 4})
    assert laid_out["c"] == 1
    return x, full, laid_out["a"]["b"]


def test_grouped_heads_and_gated_mlp_fused(stack):
    """Prefill, then three rows per example that write the same tokens: all equal the full pass."""
    x, full, params = stack
    shapes = jax.tree.map(jnp.shape, params["layers_1"])
    assert shapes["attention"]["qkv"] == {"transposed_kernel": (2 * 4 * 4, 16), "bias": (32,)}
    assert shapes["mlp"]["down"] == {"transposed_kernel": (16, 24), "bias": (16,)}
    assert shapes["mlp"]["gate_up"] == {"kernel": (16, 2, 24), "bias": (2, 24)}

    def run(part, where, mask, caches=None):
        return _apply(True, params, part, mask, positions.rotary_tables(where, 4), caches)

    hidden, states = run(x[:, :3], jnp.broadcast_to(jnp.arange(3), (2, 3)), masks.causal_mask(3))
    np.testing.assert_allclose(hidden, full[:, :3], atol=1e-5)
    cache = DecoderCache.of_prompt(states, jnp.ones((2, 3), bool)).reserve(3, 3)
    for i in range(3, 6):
        following, mask, where = cache.begin()
        np.testing.assert_array_equal(where, np.full((2, 3), i))
        hidden, layers = run(jnp.repeat(x[:, i : i + 1], 3, axis=1), where, mask, cache.layers)
        cache = following.replace(layers=layers).select(jnp.array([[2, 0, 0], [1, 2, 1]]))
        np.testing.assert_allclose(hidden, jnp.repeat(full[:, i : i + 1], 3, axis=1), atol=1e-5)


def test_rows_continue_what_they_select(stack):
    """Rows write different tokens and change places; each equals the full pass over its own history."""
    x, _, params = stack
    rng = np.random.default_rng(0)
    cache = None
    history = np.repeat(np.asarray(x[:, :2])[:, None], 3, axis=1)  # [B, n, L, E]

    def run(part, where, mask, caches=None):
        return _apply(True, params, part, mask, positions.rotary_tables(where, 4), caches)

    _, states = run(x[:, :2], jnp.broadcast_to(jnp.arange(2), (2, 2)), masks.causal_mask(2))
    cache = DecoderCache.of_prompt(states, jnp.ones((2, 2), bool)).reserve(4, 3)
    for step in range(4):
        token = rng.normal(size=(2, 3, 16)).astype(np.float32)
        history = np.concatenate([history, token[:, :, None]], axis=2)
        following, mask, where = cache.begin()
        hidden, layers = run(jnp.asarray(token), where, mask, cache.layers)
        length = 3 + step
        flat = jnp.asarray(np.pad(history.reshape(6, length, 16), ((0, 0), (0, 6 - length), (0, 0))))
        expected, _ = run(flat, jnp.broadcast_to(jnp.arange(6), (6, 6)), masks.causal_mask(6))
        np.testing.assert_allclose(hidden, expected[:, length - 1].reshape(2, 3, 16), atol=2e-5)
        chosen = rng.integers(0, 3, (2, 3))
        cache = following.replace(layers=layers).select(jnp.asarray(chosen))
        history = np.take_along_axis(history, chosen[:, :, None, None], axis=1)


def test_trees_that_do_not_fit():
    with pytest.raises(UserError, match="expected 'decoder', found only text"):
        decoding_layout({"text": {}}, {"decoder": 4})
    with pytest.raises(UserError, match="laid out for decoding already"):
        decoding_layout({"text": {"layers_0": {}}}, {"text": 4})
