"""Rows packed end to end, against the same rows with their padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.encoders.bert import Bert, BertConfig
from vlm.encoders.clip_text import ClipText, ClipTextConfig
from vlm.layers.packing import pack, packed_mask, packed_places
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


def _bert(pre_norm, positions, layers=2):
    options = {"type_vocab_size": 2, "pre_norm": pre_norm, "positions": positions, "pooler": True}
    return Bert(BertConfig(**SIZE, num_layers=layers, **options))


@pytest.mark.parametrize("at", ["first", "some"])
@pytest.mark.parametrize(("pre_norm", "positions", "layers"), [(False, "roberta", 2), (True, "absolute", 1)])
def test_a_packed_encoder_gives_the_states_and_gradients_of_its_rows(pre_norm, positions, layers, at):
    module, rng = _bert(pre_norm, positions, layers), np.random.default_rng(0)
    tokens = np.where(MASK, rng.integers(4, 50, MASK.shape), 1)
    types = rng.integers(0, 2, MASK.shape)
    params = random_params(module, tokens)
    read = np.minimum([[0, 1]] if at == "some" else [[0]], MASK.sum(1)[:, None] - 1)
    weights = rng.normal(size=(*read.shape, 32))

    def loss(params, packing):
        found = module.apply({"params": params}, tokens, MASK, token_types=types, outputs_at=read, packing=packing)
        hidden, pooled = found.last_hidden_state, found.pooler_output
        return (hidden * weights).sum() + pooled[:, 3].sum(), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradient = run(params, None)
    (_, found), gradient = run(params, _packing())
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected_gradient)


def test_embeddings_in_place_of_tokens():
    module, rng = _bert(False, "absolute"), np.random.default_rng(0)
    given = {"token_embeds": rng.normal(size=(*MASK.shape, 32)), "outputs_at": np.zeros((6, 1), int)}
    given |= {"token_types": rng.integers(0, 2, MASK.shape), "positions": rng.integers(0, 20, MASK.shape)}
    params = random_params(module, MASK.astype(int))
    run = jax.jit(lambda **more: module.apply({"params": params}, None, MASK, **given, **more).last_hidden_state)
    np.testing.assert_allclose(run(packing=_packing()), run(), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counts", [(8, 8, 0), (6, 6, 0), (8, 8, 4), (12, 12, 1), (1, 2, 3)])
def test_a_row_is_read_at_its_first_token_whatever_the_padding(counts, side):
    """Padded on the left, or without a token: finite, and equal to the whole row where it has tokens."""
    mask = np.arange(LENGTH) < np.array(counts)[:, None]
    mask = mask[:, ::-1] if side == "left" else mask
    module, tokens = _bert(False, "roberta"), np.random.default_rng(0).integers(4, 50, mask.shape)
    params = random_params(module, tokens)

    def loss(params, packing, tokens):
        first = np.zeros((3, 1), int)
        found = module.apply({"params": params}, tokens, mask, outputs_at=first, packing=packing).last_hidden_state
        return found.sum(), found

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    packing = _packing(9, mask=mask)
    assert packing.shape == (1, 27)
    (_, expected), _ = run(params, None, tokens)
    (_, found), gradient = run(params, packing, tokens)
    some = np.array(counts) > 0
    np.testing.assert_allclose(found[some], expected[some], atol=2e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    other = np.where(some[:, None], 7, tokens)
    np.testing.assert_allclose(run(params, packing, other)[0][1][~some], found[~some], atol=2e-5)  # sees no other row


def test_clips_text_tower():
    module = ClipText(ClipTextConfig(**SIZE, num_layers=2, eos_id=49))
    rng = np.random.default_rng(0)
    tokens = np.where(MASK, rng.integers(4, 49, MASK.shape), 0)
    tokens[np.arange(6), MASK.sum(1) - 1] = 49
    params = random_params(module, tokens)
    weights = rng.normal(size=(6, 32))

    def loss(params, packing):
        found = module.apply({"params": params}, tokens, MASK, pooled_only=True, packing=packing)
        return (found.pooler_output * weights).sum(), found.pooler_output

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_gradient = run(params, None)
    (_, found), gradient = run(params, _packing())
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, expected_gradient)


def test_what_a_packed_encoder_refuses():
    module, tokens = _bert(False, "roberta"), np.ones(MASK.shape, int)
    params = random_params(module, tokens)
    first = np.zeros((6, 1), int)

    def run(mask=MASK, packing=None, outputs_at=first, **more):
        packing = _packing() if packing is None else packing
        return module.apply({"params": params}, tokens, mask, packing=packing, outputs_at=outputs_at, **more)

    with pytest.raises(ValueError, match="packing: expected the mask of its rows beside it, found none"):
        run(mask=None)
    with pytest.raises(ValueError, match="packing: expected the tokens to read, outputs_at, beside it, found none"):
        run(outputs_at=None)
    with pytest.raises(ValueError, match="packing: expected groups of equally many rows, found 4 of 6 rows"):
        run(packing=np.zeros((4, 9), int))
    with pytest.raises(ValueError, match="outputs_at: expected neither hidden states, attention weights nor a cache"):
        run(output_hidden_states=True)
