"""Each logit processor and each shape of the distribution against Hugging Face's, and draws against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from vlm.generation import processors, sampling
from vlm.generation.config import GenerationConfig
from vlm.generation.processors import History, numbers

VOCAB = 9


@pytest.fixture
def case():
    """Scores and rows of different lengths, right-aligned; theirs one row at a time without padding."""
    rng = np.random.default_rng(0)
    tokens, scores = rng.integers(0, 4, (40, 12)), rng.normal(size=(40, VOCAB)).astype(np.float32)
    first = rng.integers(0, 9, 40)
    return scores, History(jnp.asarray(tokens, jnp.int32), jnp.asarray(first, jnp.int32), jnp.asarray(10, jnp.int32))


def _each_row(processor, scores, history):
    rows = []
    for row, values in enumerate(scores):
        ids = torch.tensor(np.asarray(history.tokens)[row, int(history.first[row]) : 10])[None].long()
        rows.append(processor(ids, torch.tensor(values)[None])[0].numpy())
    return np.stack(rows)


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"repetition_penalty": 1.7}, transformers.RepetitionPenaltyLogitsProcessor(1.7)),
        ({"no_repeat_ngram_size": 1}, transformers.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 2}, transformers.NoRepeatNGramLogitsProcessor(2)),
        ({"no_repeat_ngram_size": 3}, transformers.NoRepeatNGramLogitsProcessor(3)),
        ({"no_repeat_ngram_size": 13}, transformers.NoRepeatNGramLogitsProcessor(13)),
        (
            {"bad_words_ids": ((3,), (1, 2), (0, 1, 5), tuple(range(1, 9)) * 2)},
            transformers.NoBadWordsLogitsProcessor([[3], [1, 2], [0, 1, 5], list(range(1, 9)) * 2]),
        ),
        ({"min_length": 5}, transformers.MinLengthLogitsProcessor(5, [6, 7])),
    ],
)
def test_equal_hugging_face(case, settings, theirs):
    scores, history = case
    config = GenerationConfig(**settings)
    prompt_length = jnp.minimum(10 - history.first, 3)
    found = processors.process(jnp.asarray(scores), history, prompt_length, config, numbers(config, (6, 7), 20))
    np.testing.assert_allclose(found, _each_row(theirs, scores, history), rtol=1e-6)
    assert not np.array_equal(found, scores) or settings == {"no_repeat_ngram_size": 13}


def test_no_stop_token_before_so_many_new_ones(case):
    scores, history = case
    config = GenerationConfig(min_new_tokens=4)
    prompt_length = jnp.arange(40) % 10
    found = np.asarray(processors.process(scores, history, prompt_length, config, numbers(config, (6,), 20)))
    early = (10 - history.first) - prompt_length < 4
    np.testing.assert_array_equal(np.isinf(found[:, 6]), early)
    np.testing.assert_array_equal(np.delete(found, 6, 1), np.delete(scores, 6, 1))
    assert early.any() and not early.all()


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("top_k", [None, 1, 4])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 0.95])
def test_distributions_equal_hugging_face(case, keep, temperature, top_k, top_p):
    scores = torch.tensor(case[0] * 2)
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    found = sampling.warp(scores.numpy(), config, numbers(config, (6,), 20), keep=keep)
    expected = scores / temperature
    if top_k is not None:
        expected = transformers.TopKLogitsWarper(top_k, min_tokens_to_keep=keep)(None, expected)
    if top_p is not None:
        expected = transformers.TopPLogitsWarper(top_p, min_tokens_to_keep=keep)(None, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_draws_have_the_probabilities_and_their_own_keys():
    scores = jnp.log(jnp.array([0.5, 0.3, 0.2, 0.0]))
    keys = jax.random.split(jax.random.key(0), 3000)
    step_keys = sampling.row_keys(keys, 2, jnp.asarray(5))
    tokens = np.asarray(sampling.draw(step_keys, jnp.broadcast_to(scores, (3000, 2, 4))))
    np.testing.assert_allclose(np.bincount(tokens.ravel(), minlength=4) / 6000, [0.5, 0.3, 0.2, 0], atol=0.025)
    assert abs((tokens[:, 0] == tokens[:, 1]).mean() - 0.38) < 0.04  # rows are independent: Σ p²
    other = sampling.row_keys(keys, 2, jnp.asarray(6))
    assert (
        abs((np.asarray(sampling.draw(other, jnp.broadcast_to(scores, (3000, 2, 4)))) == tokens).mean() - 0.38) < 0.04
    )


def test_draws_without_replacement_have_the_published_order():
    """The probability of the pair (i, j) is p_i · p_j / (1 − p_i)."""
    p = np.array([0.5, 0.3, 0.2])
    keys = jax.random.split(jax.random.key(1), 6000)
    scores = jnp.broadcast_to(jnp.log(p), (6000, 3))
    pairs = np.asarray(sampling.draw_without_replacement(keys, scores, 2))
    for i in range(3):
        for j in range(3):
            expected = 0 if i == j else p[i] * p[j] / (1 - p[i])
            assert abs(((pairs[:, 0] == i) & (pairs[:, 1] == j)).mean() - expected) < 0.025
