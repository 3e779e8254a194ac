"""BERT's masking: rates, special tokens, padding, labels."""

import numpy as np

from vlm.data.masking import IGNORE, mask_tokens


def test_rates_labels_and_untouchable_tokens():
    tokens = np.full(200_000, 7, np.int32)
    tokens[::10], tokens[1::10] = 0, 2
    mask = np.ones(tokens.shape, bool)
    mask[150_000:] = False
    options = {"probability": 0.15, "mask_id": 99, "vocab_size": 100, "special_ids": {0, 1, 2, 99}}
    fed, labels = mask_tokens(tokens, mask, np.random.default_rng(0), **options)
    chosen = labels != IGNORE
    assert not chosen[150_000:].any() and not chosen[tokens != 7].any()
    assert (labels[chosen] == 7).all() and (fed[~chosen] == tokens[~chosen]).all()
    eligible = (mask & (tokens == 7)).sum()
    assert abs(chosen.sum() / eligible - 0.15) < 0.005
    drawn = fed[chosen & (fed != 99) & (fed != 7)]
    assert not np.isin(drawn, [0, 1, 2]).any() and set(drawn) == set(range(3, 99)) - {7}
    shares = [(fed[chosen] == 99).mean(), (fed[chosen] == 7).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1 + 0.1 / 96], atol=0.01)
    again, _ = mask_tokens(tokens, mask, np.random.default_rng(0), **options)
    np.testing.assert_array_equal(fed, again)
