"""The scanned stack against its layers run one by one; rematerialisation, dropout, stochastic depth."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.flops import count_flops
from vlm.layers import masks
from vlm.layers.cache import Cache
from vlm.layers.transformer import LayerInput, TransformerBlock, _groups, scan_layers

from ..quick import random_params

SIZES = {"num_heads": 2, "head_dim": 8, "mlp_dim": 32, "activation": "gelu", "norm_eps": 1e-5}


class Stack(nn.Module):
    """A stack alone, to call `scan_layers` from."""

    options: dict
    num_layers: int = 3

    @nn.compact
    def __call__(self, x, mask=None, **flags):
        return scan_layers(partial(TransformerBlock, **{**SIZES, **self.options}), self.num_layers, x, mask, **flags)


def _init(**options):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 16)), jnp.float32)
    model = Stack(options)
    return model, {"params": random_params(model, x)}, x


@pytest.mark.parametrize("options", [{}, {"pre_norm": False}, {"norm": "rms", "gated_mlp": True, "activation": "silu"}])
def test_scan_equals_layers_one_by_one(options):
    model, params, x = _init(**options)
    mask = masks.padding_mask(jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool))
    found = jax.jit(partial(model.apply, output_hidden_states=True, output_attentions=True))(params, x, mask)
    block, hidden, states, weights = TransformerBlock(**{**SIZES, **options}, output_attentions=True), x, [x], []
    run = jax.jit(lambda layer, hidden: block.apply({"params": layer}, hidden, LayerInput(), mask))
    for i in range(3):
        hidden, output = run(jax.tree.map(lambda p, i=i: p[i], params["params"]["layers"]), hidden)
        states.append(hidden)
        weights.append(output.attention)
    np.testing.assert_allclose(found.hidden, hidden, atol=1e-5)
    np.testing.assert_allclose(found.hidden_states, jnp.stack(states), atol=1e-5)
    np.testing.assert_allclose(found.attentions, jnp.stack(weights), atol=1e-6)
    np.testing.assert_allclose(found.attentions.sum(-1), 1, atol=1e-5)
    assert np.all(np.asarray(found.attentions)[:, 1, :, :, 3:] == 0)


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_rematerialisation_changes_neither_value_nor_gradient(remat, unroll):
    model, params, x = _init()

    def run(**options):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(model.apply(p, x, **options).hidden).sum()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(), run(remat=remat, unroll=unroll)
    )


def test_full_remat_keeps_fewer_bytes():
    model, params, _ = _init()
    x = jnp.zeros((64, 64, 16))

    def temp(remat):
        f = jax.grad(lambda p: jnp.square(model.apply(p, x, remat=remat).hidden).sum())
        return jax.jit(f).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temp("full") < 0.8 * temp("none")


def test_dropout_differs_between_layers_and_is_keyed():
    model, params, x = _init(dropout_rate=0.5)
    keyed = jax.jit(lambda key: model.apply(params, x, deterministic=False, rngs={"dropout": key}).hidden)
    run = lambda seed: keyed(jax.random.key(seed))  # noqa: E731
    assert np.abs(run(0) - run(1)).max() > 1e-2
    np.testing.assert_array_equal(run(0), run(0))


def test_stochastic_depth_drops_whole_examples_at_the_linear_rates():
    """With rate 1 in the last layer, that layer is the identity; the first layer (rate 0) is always kept."""
    model, params, x = _init()
    flags = {"deterministic": False, "output_hidden_states": True, "drop_path_rate": 1.0}
    run = lambda key: model.apply(params, x, rngs={"dropout": key}, **flags).hidden_states  # noqa: E731
    states = jax.jit(run)(jax.random.key(0))
    np.testing.assert_array_equal(states[3], states[2])
    plain = jax.jit(partial(model.apply, output_hidden_states=True))(params, x).hidden_states
    np.testing.assert_allclose(states[1], plain[1], atol=1e-6)

    many = jax.jit(jax.vmap(lambda key: jnp.abs(jnp.diff(run(key)[1:3], axis=0)).max((0, 2, 3))))
    changed = many(jax.random.split(jax.random.key(3), 500))
    assert abs(float((changed == 0).mean()) - 0.25) < 0.05  # both branches of the middle layer dropped: 0.5²


def test_stacked_cache_equals_the_full_pass():
    model, params, x = _init(num_kv_heads=1)
    full = jax.jit(model.apply)(params, x, masks.causal_mask(5)).hidden
    step = jax.jit(lambda part, mask, cache: model.apply(params, part, mask, cache=cache))
    cache = jax.tree.map(lambda x: jnp.stack([x] * 3), Cache.constant(*jnp.zeros((2, 2, 0, 1, 8))).reserve(8))
    outputs = []
    for i in range(5):
        mask = (jnp.arange(8) <= i)[None, None, None]
        output = step(x[:, i : i + 1], mask, cache)
        cache = output.cache
        outputs.append(output.hidden)
    np.testing.assert_array_equal(cache.index, [5, 5, 5])
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), full, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"pre_norm": False}])
@pytest.mark.parametrize(("depth", "remat"), [(3, "none"), (3, "full"), (1, "none")])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_last_layer_of_a_few_tokens(options, depth, remat, deterministic):
    """Values and gradients are those of the whole pass, with masks over keys and over pairs of tokens."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 16)), jnp.float32)
    model = Stack(options, depth)
    params = {"params": random_params(model, x)}
    padding = masks.padding_mask(jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool))
    positions = jnp.array([[0, 3], [2, 1]])

    def run(mask, where, later):
        def total(params, x):
            flags = {"remat": remat, "deterministic": deterministic}
            hidden = model.apply(params, x, mask, outputs_at=where, **flags).hidden
            return jnp.sin(hidden if later is None else jnp.take_along_axis(hidden, later[:, :, None], axis=1)).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(params, x)

    for mask in (None, padding, padding & masks.causal_mask(5)):
        found, expected = run(mask, positions, None), run(mask, None, positions)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_last_layer_of_a_few_tokens_has_the_same_parameters_and_its_own_dropout():
    model, params, x = _init(dropout_rate=0.5)
    first = jnp.zeros((2, 1), jnp.int32)
    made = jax.jit(partial(model.init, outputs_at=first))(jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, nn.unbox(made))
    assert jax.tree.map(jnp.shape, params) == shapes
    run = partial(model.apply, params, x, outputs_at=first, deterministic=False)
    one, again, other = (run(rngs={"dropout": jax.random.key(seed)}).hidden for seed in (0, 0, 1))
    assert one.shape == (2, 1, 16)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    with pytest.raises(ValueError, match="outputs_at: expected neither hidden states"):
        model.apply(params, x, outputs_at=first, output_hidden_states=True)


def test_a_last_layer_of_a_few_tokens_does_their_work_alone():
    model, params, x = _init()

    def flops(where):
        step = jax.jit(jax.grad(lambda p: model.apply(p, x, outputs_at=where).hidden.sum()))
        return count_flops(step.trace(params).jaxpr)

    per_token = 2 * (2 * 16 * 16 + 2 * 16 * 32) + 2 * 2 * 5 * 16  # query, out and the MLP; scores and their mixture
    assert flops(None) - flops(jnp.zeros((2, 1), jnp.int32)) == 3 * 2 * 4 * per_token


def test_groups_of_examples_equal_the_whole_batch(monkeypatch):
    """Values and gradients, with a mask of every example's own and one for all, whole and for a few tokens."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5, 16)), jnp.float32)
    model = Stack({})
    params = {"params": random_params(model, x)}
    padding = masks.padding_mask(jnp.arange(5)[None] < jnp.array([5, 3, 1, 4, 2, 5])[:, None])
    where = jnp.array([[0, 4], [1, 2], [3, 0], [2, 2], [4, 1], [0, 1]])

    def run(size):
        monkeypatch.setattr("vlm.layers.transformer.CACHE_BYTES", size)
        found = []
        for mask in (None, padding, masks.causal_mask(5)):
            for outputs_at in (None, where):
                call = partial(model.apply, mask=mask, outputs_at=outputs_at)
                found.append(jax.jit(jax.value_and_grad(lambda p, call=call: jnp.sin(call(p, x).hidden).sum()))(params))
        return found, str(jax.make_jaxpr(model.apply)(params, x)).count("scan[")

    rows = 16 * 5 * 16
    (whole, one), (pairs, two) = run(6 * rows), run(3 * rows - 1)
    assert (one, two) == (1, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), pairs, whole)


@pytest.mark.parametrize(("batch", "groups"), [(8, 2), (9, 3), (4, 1), (7, 1), (31, 1), (32, 8)])
def test_groups_are_at_least_half_of_what_fits(batch, groups, monkeypatch):
    """Groups of single examples would be slower than too large a batch."""
    monkeypatch.setattr("vlm.layers.transformer.CACHE_BYTES", 4 * 16 * 5 * 16)
    assert _groups(np.zeros((batch, 5, 16), np.float32)) == groups
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((8,), ("data",))):
        assert _groups(np.zeros((batch, 5, 16), np.float32)) == 1
