"""FLAVA's fusion encoder alone: its class token, what may be attended to, its outputs."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlm.fusion.multimodal import FusionConfig, FusionEncoder
from vlm.tree import flatten

CONFIG = FusionConfig(hidden_size=8, num_layers=2, num_heads=2, mlp_dim=12)
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(3, 5, 8)).astype(np.float32)
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2, [True, False, True, False, True]])


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(lambda: nn.unbox(FusionEncoder(CONFIG).init(jax.random.key(0), TOKENS)["params"]))
    return jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


@functools.cache
def compiled(config, masked):
    flags = {"output_hidden_states": True, "output_attentions": True}

    def run(params, tokens, mask):
        return FusionEncoder(config).apply({"params": params}, tokens, mask if masked else None, **flags)

    return jax.jit(run)


def test_outputs(params):
    output = compiled(CONFIG, True)(params, TOKENS, MASK)
    states = [np.asarray(state, np.float64) for state in output.hidden_states]
    assert len(states) == 3 and states[0].shape == (3, 6, 8)
    np.testing.assert_array_equal(states[0][:, 0], np.tile(params["class_embedding"], (3, 1)))
    np.testing.assert_array_equal(states[0][:, 1:], TOKENS)  # no position, no modality is added
    np.testing.assert_array_equal(output.pre_norm_state, states[-1])
    norm, pooler = params["output_norm"], params["pooler"]
    centred = states[-1] - states[-1].mean(-1, keepdims=True)
    last = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(output.last_hidden_state, last, atol=1e-5)
    np.testing.assert_allclose(output.pooler_output, np.tanh(last[:, 0] @ pooler["kernel"] + pooler["bias"]), atol=1e-5)


def test_what_is_masked_is_not_attended_to_and_the_class_token_always_is(params):
    run = compiled(CONFIG, True)
    output = run(params, TOKENS, MASK)
    whole = np.pad(MASK, ((0, 0), (1, 0)), constant_values=True)
    for attention in output.attentions:  # [B, heads, query, key]
        attention = np.asarray(attention)
        hidden = np.broadcast_to(~whole[:, None, None], attention.shape)
        assert attention.shape == (3, 2, 6, 6) and not attention[hidden].any() and (attention[~hidden] > 0).all()
    others = np.where(MASK[:, :, None], TOKENS, RNG.normal(size=TOKENS.shape)).astype(np.float32)
    changed = run(params, others, MASK)
    np.testing.assert_allclose(changed.last_hidden_state[whole], output.last_hidden_state[whole], atol=1e-6)
    nothing = run(params, others, np.zeros_like(MASK))  # of a text that is all padding: no NaN
    assert np.isfinite(nothing.last_hidden_state).all()


def test_without_a_mask_all_is_attended_to_in_any_order(params):
    run = compiled(CONFIG, False)
    output = run(params, TOKENS, MASK)
    same = compiled(CONFIG, True)(params, TOKENS, np.ones_like(MASK))
    np.testing.assert_allclose(output.last_hidden_state, same.last_hidden_state, atol=1e-6)
    assert not np.allclose(output.pooler_output[1], compiled(CONFIG, True)(params, TOKENS, MASK).pooler_output[1])
    order = np.array([3, 0, 4, 1, 2])
    moved = run(params, TOKENS[:, order], MASK).last_hidden_state
    np.testing.assert_allclose(moved, output.last_hidden_state[:, [0, *(1 + order)]], atol=1e-5)


def test_without_class_token_and_pooler():
    config = FusionConfig(8, 1, 2, 12, class_token=False, pooler=False)
    shapes = jax.eval_shape(lambda: nn.unbox(FusionEncoder(config).init(jax.random.key(0), TOKENS)["params"]))
    assert {path.split("/")[0] for path in flatten(shapes)} == {"layers", "output_norm"}
    output = jax.eval_shape(lambda params: FusionEncoder(config).apply({"params": params}, TOKENS, MASK), shapes)
    assert output.last_hidden_state.shape == TOKENS.shape and output.pooler_output is None


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"hidden_size: expected a multiple of num_heads=3, found 8"):
        FusionConfig(8, 1, 3)
