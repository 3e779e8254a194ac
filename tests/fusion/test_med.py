"""MED against a NumPy reference written from the paper: every mode and mask, where HF is wrong too."""

import dataclasses
import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from scipy.special import erf

from vlm import sharding
from vlm.fusion.med import Med, MedConfig
from vlm.layers.layout import decoding_layout
from vlm.schema import MeshConfig, ShardingConfig
from vlm.tree import flatten, unflatten

from ..quick import equations

CONFIG = MedConfig(40, 12, 3, 2, 20, 9, 8)
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile
TOKENS = np.array([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
MASK = TOKENS != 0
CONTEXT = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
PAIR = np.random.default_rng(1).normal(size=(2, 2, 4, 8)).astype(np.float32)
CONTEXT_MASK = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], bool)
PAIR_MASK = np.stack([CONTEXT_MASK, CONTEXT_MASK[::-1]], 1)


def _random(model, seed=0, **arguments):
    """Random parameters, norms and biases included."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, **arguments))
    rng = np.random.default_rng(seed)
    draw = {path: rng.normal(size=leaf.shape) for path, leaf in flatten(nn.unbox(shapes)["params"]).items()}
    return unflatten({k: (0.2 * v + k.endswith("/scale")).astype(np.float32) for k, v in draw.items()})


@functools.cache
def _compiled(model, constants):
    def run(params, arguments, flags):
        return model.apply({"params": params}, *arguments, **flags, **dict(constants))

    return jax.jit(run, compiler_options=QUICK)


def _apply(model, params, *arguments, **flags):
    constants = {name: flags.pop(name) for name in sorted(flags) if isinstance(flags[name], bool)}
    return _compiled(model, tuple(constants.items()))(params, arguments, flags)


# ---------------------------------------------------------------------------------------------------------- reference


def _norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def _attend(p, x, source, visible, heads=2):
    def split(name, y):
        y = y @ p[name]["kernel"] + p[name]["bias"]
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    query, key, value = split("query", x), split("key", source), split("value", source)
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    scores = np.where(visible, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ value).transpose(0, 2, 1, 3).reshape(x.shape)
    return mixed @ p["out"]["kernel"] + p["out"]["bias"], weights


def _reference(params, tokens, mask, context=None, context_mask=None, causal=False, self_attention="attention"):
    """Float64, layer by layer. Returns the hidden states of all layers, attentions and cross-attentions."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    x = params["token_embedding"]["embedding"][tokens] + params["position_embedding"]["embedding"][: tokens.shape[1]]
    x = _norm(x, params["embedding_norm"])
    length = tokens.shape[1]
    visible = np.broadcast_to(mask[:, None, None, :], (len(tokens), 1, length, length))
    visible = visible & np.tril(np.ones((length, length), bool)) if causal else visible
    states, attentions, crosses = [x], [], []
    for name in ("layers", "average_layers", "merge_layers"):
        stack = params.get(name)
        for i in range(len(jax.tree.leaves(stack)[0]) if stack else 0):
            layer = jax.tree.map(lambda p, i=i: p[i], stack)
            branch, weights = _attend(layer[self_attention], x, x, visible)
            attentions.append(weights)
            x = _norm(x + branch, layer[f"{self_attention}_norm"])
            if context is not None and name == "layers":
                branch, weights = _attend(layer["cross_attention"], x, context, context_mask[:, None, None, :])
            elif context is not None:
                both = [
                    _attend(layer[f"cross_attention_{j}"], x, context[:, j], context_mask[:, j, None, None, :])
                    for j in range(2)
                ]
                weights = np.stack([w for _, w in both], 1)
                branch = (both[0][0] + both[1][0]) / 2
                if name == "merge_layers":
                    joined = np.concatenate([b for b, _ in both], -1)
                    branch = joined @ layer["merge"]["kernel"] + layer["merge"]["bias"]
            if context is not None:
                crosses.append(weights)
                x = _norm(x + branch, layer["cross_attention_norm"])
            up = x @ layer["mlp"]["up"]["kernel"] + layer["mlp"]["up"]["bias"]
            down = 0.5 * up * (1 + erf(up / np.sqrt(2))) @ layer["mlp"]["down"]["kernel"]
            x = _norm(x + down + layer["mlp"]["down"]["bias"], layer["mlp_norm"])
            states.append(x)
    return np.stack(states), np.stack(attentions), np.stack(crosses) if crosses else None


MODES = {
    "text": ({}, {}, {}),
    "grounded": ({}, {"context": CONTEXT, "context_mask": CONTEXT_MASK}, {}),
    "decoder": ({}, {"context": CONTEXT, "context_mask": CONTEXT_MASK, "causal": True}, {}),
    "sharing encoder": ({"shared_decoder": True}, {"context": CONTEXT, "context_mask": CONTEXT_MASK}, {}),
    "shared decoder": (
        {"shared_decoder": True},
        {"context": CONTEXT, "context_mask": CONTEXT_MASK, "causal": True},
        {"self_attention": "decoder_attention"},
    ),
    "pairs": ({"average_layers": 1}, {"context": PAIR, "context_mask": PAIR_MASK}, {}),
    "pairs averaged": ({"average_layers": 3}, {"context": PAIR, "context_mask": PAIR_MASK}, {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_reference(mode):
    options, arguments, more = MODES[mode]
    model = Med(CONFIG, **options)
    params = _random(model)
    found = _apply(model, params, TOKENS, MASK, output_hidden_states=True, output_attentions=True, **arguments)
    states, attentions, crosses = _reference(params, TOKENS, MASK, **arguments, **more)
    np.testing.assert_allclose(found.hidden_states, states, atol=1e-5)
    np.testing.assert_allclose(found.last_hidden_state, states[-1], atol=1e-5)
    np.testing.assert_allclose(found.pooler_output, states[-1][:, 0], atol=1e-5)
    np.testing.assert_allclose(found.attentions, attentions, atol=2e-6)
    if crosses is None:
        assert found.cross_attentions is None
    else:
        np.testing.assert_allclose(found.cross_attentions, crosses, atol=2e-6)


def test_one_stack_of_two_uses_shares_all_but_self_attention():
    paths = set(flatten(_random(Med(CONFIG, shared_decoder=True))))
    plain = set(flatten(_random(Med(CONFIG))))
    second = {p.replace("/attention", "/decoder_attention") for p in plain if "/attention" in p}
    assert len(second) == 10
    assert paths == plain | second


@pytest.mark.parametrize("options", [{}, {"shared_decoder": True}, {"average_layers": 1}])
@pytest.mark.parametrize("causal", [False, True])
def test_init_makes_every_parameter_in_every_mode(options, causal):
    model = Med(CONFIG, **options)
    context = PAIR if options.get("average_layers") else CONTEXT
    full = flatten(_random(model, context=context))
    assert flatten(_random(model, causal=causal)).keys() == full.keys()
    kernels = [p for p in full if "/cross_attention" in p and p.endswith("/key/kernel")]
    assert kernels
    assert all(full[p].shape[1] == CONFIG.context_size for p in kernels)


def test_shared_parameters_get_the_sum_of_both_uses_gradients():
    model = Med(CONFIG, shared_decoder=True)
    params = _random(model)
    use = {"context": CONTEXT, "context_mask": CONTEXT_MASK}

    def loss(params, encoder, decoder):
        encoded = model.apply({"params": params}, TOKENS, MASK, **use).last_hidden_state
        decoded = model.apply({"params": params}, TOKENS, MASK, **use, causal=True).last_hidden_state
        return encoder * jnp.sin(encoded).sum() + decoder * jnp.sin(2 * decoded).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)
    both, one, other = (flatten(gradient(params, *w)) for w in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)))
    for path, summed in both.items():
        np.testing.assert_allclose(summed, one[path] + other[path], atol=1e-4, err_msg=path)
        encoder_only = "/attention" in path
        decoder_only = "/decoder_attention" in path
        assert np.any(one[path] != 0) != decoder_only, path
        assert np.any(other[path] != 0) != encoder_only, path


def test_hidden_context_changes_nothing_here_and_does_in_hf(randomise):
    """HF 5.23 drops the mask of its cross-attention; the model as published, and ours, honour it."""
    model = Med(CONFIG)
    params = _random(model)
    changed = np.where(CONTEXT_MASK[..., None], CONTEXT, 100.0).astype(np.float32)
    ours = [
        _apply(model, params, TOKENS, MASK, context=c, context_mask=CONTEXT_MASK).last_hidden_state
        for c in (CONTEXT, changed)
    ]
    np.testing.assert_allclose(*ours, atol=1e-6)
    config = transformers.BlipTextConfig(
        vocab_size=40,
        hidden_size=12,
        encoder_hidden_size=8,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    reference = randomise(transformers.BlipTextModel(config, add_pooling_layer=False))
    theirs = [
        reference(
            torch.tensor(TOKENS),
            encoder_hidden_states=torch.tensor(c),
            encoder_attention_mask=torch.tensor(CONTEXT_MASK.astype(int)),
        )[0].detach()
        for c in (CONTEXT, changed)
    ]
    assert (theirs[0] - theirs[1]).abs().max() > 0.01  # once this fails, HF honours the mask: compare with it


def test_the_future_and_padding_are_hidden():
    model = Med(CONFIG)
    params = _random(model)
    later = TOKENS.copy()
    later[:, 3:] = 20

    @partial(jax.jit, compiler_options=QUICK)
    def run(tokens, mask):
        flags = {"context": CONTEXT[: len(tokens)], "causal": True}
        return model.apply({"params": params}, tokens, mask, **flags).last_hidden_state

    np.testing.assert_allclose(run(TOKENS, MASK)[:, :3], run(later, MASK)[:, :3], atol=1e-6)
    other = np.where(MASK, TOKENS, 7)
    np.testing.assert_allclose(run(TOKENS, MASK)[1, :3], run(other, MASK)[1, :3], atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("long", [1, 5])
def test_a_prompt_reads_its_context_once(long, devices, monkeypatch):
    """One CPU computes the keys and values of a long context an example at a time, to the same cache."""
    monkeypatch.setattr("vlm.layers.attention.LONG_CONTEXT", long)
    model = Med(CONFIG)
    params = _random(model, causal=True)
    laid_out = decoding_layout({"decoder": params}, {"decoder": 6})["decoder"]

    def run(tokens, mask, context, context_mask):
        return model.apply({"params": laid_out}, tokens, mask, context, context_mask, method="prefill")

    grid = sharding.make_mesh(MeshConfig(2, 1, devices // 2) if devices > 1 else MeshConfig(1), jax.devices()[:devices])
    with sharding.use(grid, ShardingConfig().rules):
        arguments = TOKENS, MASK, CONTEXT, CONTEXT_MASK
        looped = [e.primitive.name for e in equations(jax.make_jaxpr(run)(*arguments).jaxpr)].count("scan")
        hidden, cache = jax.jit(run)(*arguments)
    assert looped == (CONFIG.num_layers if long <= 4 and devices == 1 else 0)
    expected = _apply(model, params, TOKENS, MASK, context=CONTEXT, context_mask=CONTEXT_MASK, causal=True)
    np.testing.assert_allclose(hidden[MASK], expected.last_hidden_state[MASK], atol=2e-5)
    for layer, found in enumerate(cache.constants["cross"]):
        for name in ("key", "value"):
            linear = jax.tree.map(lambda x, i=layer: x[i], params["layers"]["cross_attention"][name])
            whole = CONTEXT @ linear["kernel"] + linear["bias"]
            np.testing.assert_allclose(getattr(found, name), whole.reshape(2, 4, 2, 6).swapaxes(1, 2), atol=2e-5)


def test_positions_given():
    model = Med(CONFIG)
    params = _random(model)
    left = np.array([[0, 0, 10, 11, 12]])
    positions = np.array([[0, 0, 0, 1, 2]])
    found = _apply(model, params, left, left != 0, positions=positions).last_hidden_state[:, 2:]
    np.testing.assert_allclose(found, _apply(model, params, left[:, 2:]).last_hidden_state, atol=1e-6)


def test_pooler():
    model = Med(MedConfig(40, 12, 1, 2, 20, 9, 8, pooler=True))
    params = _random(model)
    found = _apply(model, params, TOKENS)
    pooler = params["pooler"]
    expected = np.tanh(np.asarray(found.last_hidden_state[:, 0] @ pooler["kernel"]) + np.asarray(pooler["bias"]))
    np.testing.assert_allclose(found.pooler_output, expected, atol=1e-6)


def test_dropout_is_keyed_and_everywhere():
    model = Med(CONFIG)
    params = _random(model)

    @partial(jax.jit, compiler_options=QUICK)
    def run(key):
        flags = {"deterministic": False, "rngs": {"dropout": key}}
        return model.apply({"params": params}, TOKENS, context=CONTEXT, **flags).last_hidden_state

    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_rematerialisation_saves_less():
    params = _random(Med(CONFIG))

    def saved(remat):
        def loss(p):
            model = Med(dataclasses.replace(CONFIG, remat=remat))
            return model.apply({"params": p}, TOKENS, MASK, context=CONTEXT).last_hidden_state.sum()

        _, pullback = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert saved("full") < saved("dots") < saved("none")


@pytest.mark.parametrize(
    ("options", "context", "message"),
    [
        ({}, CONTEXT[..., :5], r"context: expected \[2, M, 8\], found \[2, 4, 5\]"),
        ({}, PAIR, r"context: expected \[2, M, 8\], found \[2, 2, 4, 8\]"),
        ({"average_layers": 1}, CONTEXT, r"context: expected \[2, 2, M, 8\], found \[2, 4, 8\]"),
    ],
)
def test_another_context_is_refused(options, context, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: Med(CONFIG, **options).init(jax.random.key(0), TOKENS, context=context))


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens: expected at most 9 per row, found 10"):
        jax.eval_shape(lambda: Med(CONFIG).init(jax.random.key(0), np.zeros((1, 10), int)))


def test_head_counts_must_divide():
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of num_heads=5, found 12"):
        MedConfig(hidden_size=12, num_heads=5)
