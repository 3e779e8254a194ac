"""The codebook's encoder: what its parts compute, in which precision, and the pictures that it refuses.

Its output is compared with Hugging Face's in tests/models/flava/test_model.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.encoders.dvae import DVAEConfig, DVAEEncoder
from vlm.sharding import unbox

from ..quick import products

MODEL = DVAEEncoder(DVAEConfig(num_groups=2, blocks_per_group=1, hidden_size=4, vocab_size=6))
IMAGE = np.random.default_rng(0).uniform(0.1, 0.9, (2, 4, 6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return unbox(jax.jit(lambda key: MODEL.init(key, IMAGE)["params"])(jax.random.key(0)))


def test_every_product_is_exact(params):
    """Accelerators multiply float32 in less unless told; the likeliest word would flip."""
    found = list(products(jax.make_jaxpr(lambda p, x: MODEL.apply({"params": p}, x))(params, IMAGE).jaxpr))
    assert len(found) == 1 + 4 + (4 + 1) + 1  # input, two blocks of four of which one changes the width, out
    assert all(exact for exact, _ in found), found


def test_half_precision_pictures_are_encoded_in_float32(params):
    run = jax.jit(lambda x: MODEL.apply({"params": params}, x))
    half = jnp.asarray(IMAGE, jnp.bfloat16)
    assert run(half).dtype == jnp.float32
    np.testing.assert_array_equal(run(half), run(half.astype(jnp.float32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_half_precision_are_used_in_float32(params, dtype):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    found = MODEL.apply({"params": half}, IMAGE)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, MODEL.apply({"params": jax.tree.map(jnp.float32, half)}, IMAGE))


def test_words_are_the_likeliest_of_each_cell(params):
    logits = MODEL.apply({"params": params}, IMAGE)
    assert logits.shape == (2, 2, 3, 6)
    features = MODEL.apply({"params": params}, IMAGE, method=MODEL.features)
    words = MODEL.apply({"params": params}, features, method=MODEL.words)
    np.testing.assert_array_equal(words, np.argmax(logits, -1))
    assert words.dtype == jnp.int32 and np.asarray(features).min() >= 0


def test_sides_and_sizes_that_do_not_fit_are_refused(params):
    with pytest.raises(ValueError, match="codebook image: expected sides that are multiples of 2, found 4x5"):
        MODEL.apply({"params": params}, IMAGE[:, :, :5])
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of 4, found 6"):
        DVAEConfig(hidden_size=6)
    with pytest.raises(ValueError, match="num_groups: expected at least 1, found 0"):
        DVAEConfig(num_groups=0)
