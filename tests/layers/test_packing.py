"""Rows packed end to end, against the same rows with their padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.encoders.bert import Bert, BertConfig
from vlm.encoders.clip_text import ClipText, ClipTextConfig
from vlm.layers.packing import pack, packed_mask, packed_places, unpack
from vlm.padding import TextLengths

from ..quick import random_params

LENGTH = 12
MASK = np.arange(LENGTH) < np.array([[5], [12], [1], [2], [7], [3]])
SIZE = {"vocab_size": 50, "hidden_size": 32, "num_heads": 4, "mlp_dim": 48, "max_length": 20}


def _packing(length=8, rows=3, mask=MASK):
    return jnp.asarray(TextLengths((length,), rows).fit({"mask": mask})["packing"])


def test_masks_and_places():
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)
    packing = np.array([[0, 1, 3, 2]])  # the last is padding of the first row, and sees what it saw there
    visible = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(packed_mask(mask, packing)[0, 0], np.array(visible, bool))
    visible[0][1] = 0
    np.testing.assert_array_equal(packed_mask(mask, packing, causal=True)[0, 0], np.array(visible, bool))
    places = packed_places(packing, 2, 3)
    np.testing.assert_array_equal(places, [[0, 1, 3], [2, 4, 4]])
    x = np.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(pack(x, packing)[0], x.reshape(6, 2)[[0, 1, 3, 2]])
    back = x.copy()
    back[1, 1:] = 0
    np.testing.assert_array_equal(unpack(pack(x, packing), places), back)


def _bert(pre_norm, positions, layers=2):
    options = {"type_vocab_size": 2, "pre_norm": pre_norm, "positions": positions, "pooler": True}
    return Bert(BertConfig(**SIZE, num_layers=layers, **options))


@pytest.mark.parametrize("at", ["all", "first", "some"])
@pytest.mark.parametrize(("pre_norm", "positions", "layers"), [(False, "roberta", 2), (True, "absolute", 1)])
def test_a_packed_encoder_gives_the_states_and_gradients_of_its_rows(pre_norm, positions, layers, at):
    module, rng = _bert(pre_norm, positions, layers), np.random.default_rng(0)
    tokens = np.where(MASK, rng.integers(4, 50, MASK.shape), 1)
    types = rng.integers(0, 2, MASK.shape)
    params = random_params(module, tokens)
    read = {"all": None, "first": np.zeros((6, 1), int), "some": np.minimum([[0, 1]], MASK.sum(1)[:, None] - 1)}[at]
    real = MASK if read is None else np.take_along_axis(MASK, read, axis=1)
    weights = rng.normal(size=(*real.shape, 32)) * real[..., None]

    def loss(params, packing):
        found = module.apply({"params": params}, tokens, MASK, token_types=types, outputs_at=read, packing=packing)
        hidden, pooled = found.last_hidden_state, found.pooler_output
        return (hidden * weights).sum() + pooled[:, 3].sum(), jnp.where(real[..., None], hidden, 0)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradient = run(params, None)
    (_, found), gradient = run(params, _packing())
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected_gradient)


def test_embeddings_in_place_of_tokens():
    module, rng = _bert(False, "absolute"), np.random.default_rng(0)
    embeds = rng.normal(size=(*MASK.shape, 32))
    params = random_params(module, MASK.astype(int))
    run = jax.jit(lambda **more: module.apply({"params": params}, None, MASK, token_embeds=embeds, **more))
    found = run(packing=_packing()).last_hidden_state
    np.testing.assert_allclose(found[MASK], run().last_hidden_state[MASK], atol=2e-5)


@pytest.mark.parametrize("pooled_only", [True, False])
def test_clips_text_tower(pooled_only):
    module = ClipText(ClipTextConfig(**SIZE, num_layers=2, eos_id=49))
    rng = np.random.default_rng(0)
    tokens = np.where(MASK, rng.integers(4, 49, MASK.shape), 0)
    tokens[np.arange(6), MASK.sum(1) - 1] = 49
    params = random_params(module, tokens)
    weights = rng.normal(size=(6, 32))

    def loss(params, packing):
        found = module.apply({"params": params}, tokens, MASK, pooled_only=pooled_only, packing=packing)
        return (found.pooler_output * weights).sum(), found.pooler_output

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradient = run(params, None)
    (_, found), gradient = run(params, _packing())
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected_gradient)


def test_what_a_packed_encoder_refuses():
    module, tokens = _bert(False, "roberta"), np.ones(MASK.shape, int)
    params = random_params(module, tokens)
    with pytest.raises(ValueError, match="packing: expected the mask of the rows beside it, found none"):
        module.apply({"params": params}, tokens, packing=_packing())
    for flag in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match="packing: expected neither hidden states nor attention weights"):
            module.apply({"params": params}, tokens, MASK, packing=_packing(), **{flag: True})
