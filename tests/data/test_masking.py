"""BERT's masking: rates, special tokens, padding, labels."""

import numpy as np

from vlm.data.masking import IGNORE, mask_tokens, mask_words


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


OPTIONS = {"probability": 0.15, "mask_id": 99, "vocab_size": 100, "special_ids": {0, 1, 2, 99}}
CONTINUES = np.arange(100) >= 60


def row(rng, length=40):
    """[CLS] words of one to four pieces [SEP] and padding."""
    real = int(rng.integers(5, length + 1))
    tokens = np.zeros(length, np.int32)
    tokens[:real] = np.where(rng.random(real) < 0.5, rng.integers(3, 60, real), rng.integers(60, 99, real))
    tokens[0], tokens[real - 1] = 1, 2
    return tokens, np.arange(length) < real


def test_no_more_tokens_are_hidden_than_may_be():
    """Of more, all are equally likely; of fewer, nothing changes."""
    tokens, mask, counts = np.full(20, 7, np.int32), np.ones(20, bool), np.zeros(20, int)
    for seed in range(2000):
        free = mask_tokens(tokens, mask, np.random.default_rng(seed), **OPTIONS)[1] != IGNORE
        bound = mask_tokens(tokens, mask, np.random.default_rng(seed), most=3, **OPTIONS)[1] != IGNORE
        assert bound.sum() == min(3, free.sum()) and not (bound & ~free).any()
        counts += bound
    expected = counts.mean()
    assert expected < 2000 * 0.15 * 0.9 and np.abs(counts - expected).max() < 4.5 * expected**0.5


def test_whole_words_are_hidden_up_to_the_share():
    """Against the procedure written out, driven by the same order of words."""
    rng = np.random.default_rng(0)
    for seed in range(300):
        tokens, mask = row(rng)
        words = []
        for place in range(1, mask.sum() - 1):
            if CONTINUES[tokens[place]] and words:
                words[-1].append(place)
            else:
                words.append([place])
        wanted, expected = max(1, round(mask.sum() * 0.15)), []
        for number in np.random.default_rng(seed).permutation(len(words)):
            if len(expected) + len(words[number]) <= wanted:
                expected += words[number]
        fed, labels = mask_words(tokens, mask, np.random.default_rng(seed), continues=CONTINUES, **OPTIONS)
        assert np.flatnonzero(labels != IGNORE).tolist() == sorted(expected)
        chosen = labels != IGNORE
        assert (labels[chosen] == tokens[chosen]).all() and (fed[~chosen] == tokens[~chosen]).all()


def test_fate_of_whole_words():
    tokens = np.full(20_000, 7, np.int32)
    options = {**OPTIONS, "probability": 0.5, "continues": CONTINUES}
    fed, labels = mask_words(tokens, np.ones(tokens.shape, bool), np.random.default_rng(0), **options)
    chosen = labels != IGNORE
    assert chosen.sum() == 10_000
    shares = [(fed[chosen] == 99).mean(), (fed[chosen] == 7).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1 + 0.1 / 96], atol=0.016)  # four standard errors


def test_rows_without_words_stay():
    tokens, mask = np.array([1, 2, 0, 0], np.int32), np.array([True, True, False, False])
    fed, labels = mask_words(tokens, mask, np.random.default_rng(0), continues=CONTINUES, **OPTIONS)
    assert (fed == tokens).all() and (labels == IGNORE).all()
