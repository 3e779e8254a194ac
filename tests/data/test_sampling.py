import dataclasses

import numpy as np
import pytest

from vlm.data.sampling import EvalStream, MixedStream, TrainStream, mix, permute
from vlm.errors import UserError


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 1000, 4097, 65_536])
def test_permutation_is_a_bijection(size):
    for key in (0, 1, 2**63):
        assert np.array_equal(np.sort(permute(np.arange(size), size, np.uint64(key))), np.arange(size))


def test_permutation_of_any_subset_equals_the_whole():
    whole = permute(np.arange(1000), 1000, mix(7))
    some = np.array([999, 3, 3, 500])
    assert np.array_equal(permute(some, 1000, mix(7)), whole[some])


@pytest.mark.parametrize("size", [2, 3, 10])
def test_every_place_is_equally_likely(size):
    """First elements over 6,000 keys: chi-square with size-1 degrees of freedom stays below its 1e-6 quantile."""
    firsts = permute(np.zeros(6000, np.int64), size, mix(5, np.arange(6000)))
    expected = 6000 / size
    chi_square = (((np.bincount(firsts, minlength=size)) - expected) ** 2 / expected).sum()
    assert chi_square < {2: 24, 3: 28, 10: 45}[size]


def test_neighbours_are_scattered():
    order = permute(np.arange(10_000), 10_000, mix(1))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(order, permute(np.arange(10_000), 10_000, mix(2)))[0, 1]) < 0.04


def test_a_huge_range_needs_no_memory_for_it():
    size = 10**15
    drawn = permute(np.arange(1000), size, mix(3))
    assert len(set(drawn.tolist())) == 1000 and drawn.max() < size and drawn.max() > size // 2


@pytest.mark.parametrize("weights", [(1,), (0.7, 0.2, 0.1), (1, 1, 0), (3, 5, 8)])
def test_each_epoch_of_each_source_holds_every_sample_once(weights):
    lengths = (57, 13, 101)[: len(weights)]
    draws = TrainStream(lengths, weights, seed=4).draw(np.arange(3000))
    for source, length in enumerate(lengths):
        mine = draws.source == source
        if not weights[source]:
            assert not mine.any()
            continue
        finished = mine & (draws.epoch < draws.epoch[mine].max() - 1)
        for epoch in set(draws.epoch[finished].tolist()):
            samples = draws.sample[finished & (draws.epoch == epoch)]
            assert sorted(samples.tolist()) == list(range(length))
    assert draws.epoch.max() > 2


def test_epochs_and_seeds_differ():
    draws = TrainStream((100,), (1,), seed=1).draw(np.arange(200))
    assert draws.epoch.tolist() == [0] * 100 + [1] * 100
    assert (draws.sample[:100] != draws.sample[100:]).sum() > 80
    other = TrainStream((100,), (1,), seed=2).draw(np.arange(100))
    assert (draws.sample[:100] != other.sample).sum() > 80


def test_proportions_are_exact_in_every_block():
    stream = TrainStream((1000, 1000, 1000), (0.7, 0.2, 0.1))
    size = int(stream.counts.sum())
    source = stream.draw(np.arange(50 * size)).source.reshape(50, size)
    for number, share in enumerate((0.7, 0.2, 0.1)):
        assert ((source == number).sum(axis=1) == round(share * size)).all()
    assert len({row.tobytes() for row in source}) == 50  # blocks are arranged anew each time


def test_awkward_weights_are_held_to_a_65536th():
    weights = np.array([np.pi, np.e, 1e-3])
    counts = TrainStream((5, 5, 5), tuple(weights)).counts
    assert np.abs(counts / counts.sum() - weights / weights.sum()).max() <= 1 / 65536
    with pytest.raises(UserError, match="source 1 is below 1/65536"):
        _ = TrainStream((5, 5), (1, 1e-6)).counts


@pytest.mark.parametrize("lengths, weights", [((5, 5), (1,)), ((5,), (-1,)), ((5,), (0,)), ((0,), (1,)), ((), ())])
def test_bad_mixtures_are_refused(lengths, weights):
    with pytest.raises(UserError, match="^mixture: "):
        TrainStream(lengths, weights)


def test_a_million_draws_any_slicing_any_order():
    """The stream does not depend on which positions are asked together: no difference in 10^6 draws."""
    stream = TrainStream((100_003, 777, 50_000), (0.5, 0.2, 0.3), seed=11)
    whole = stream.draw(np.arange(1_000_000))
    shuffled = np.random.default_rng(0).permutation(1_000_000)
    pieces = [stream.draw(part) for part in np.array_split(shuffled, 7)]
    for name in ("source", "sample", "epoch"):
        assert np.array_equal(np.concatenate([getattr(p, name) for p in pieces]), getattr(whole, name)[shuffled])


def test_replacements_are_in_range_and_vary():
    stream = TrainStream((50, 7), (1, 1), seed=3)
    seen = [stream.replacement(1, 4, 0, attempt) for attempt in range(1, 40)]
    assert set(seen) == set(range(7))
    assert seen == [stream.replacement(1, 4, 0, attempt) for attempt in range(1, 40)]


def test_evaluation_is_one_ordered_pass():
    stream = EvalStream((3, 2))
    draws = stream.draw(np.arange(7))
    assert draws.source.tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert draws.sample.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert draws.valid.tolist() == [True] * 5 + [False] * 2


MIXED = MixedStream(
    (40, 9, 30, 20), (2, 1, 7, 5), ("pairs", "pairs", "text", "images"), {"pairs": 0.7, "images": 0.15, "text": 0.15}, 8
)
STREAM_OF = np.array(["pairs", "pairs", "text", "images"])


def test_every_batch_comes_from_one_stream_in_exact_shares():
    size = int(MIXED.counts.sum())
    streams = STREAM_OF[MIXED.draw(np.arange(5 * size * 8)).source].reshape(5 * size, 8)
    assert (streams == streams[:, :1]).all()
    assert streams[:, 0].tolist() == [MIXED.name(step) for step in range(5 * size)]
    for block in streams[:, 0].reshape(5, size):
        assert {name: (block == name).mean() for name in MIXED.names} == {"pairs": 0.7, "images": 0.15, "text": 0.15}
    for steps in (0, 1, size - 1, size, 3 * size + 11):
        assert MIXED.steps(steps) == {name: int((streams[:steps, 0] == name).sum()) for name in MIXED.names}
    assert len({block.tobytes() for block in streams[:, 0].reshape(5, size)}) == 5


def test_streams_mix_their_own_sources_and_hold_whole_epochs():
    draws = MIXED.draw(np.arange(4000))
    pairs = STREAM_OF[draws.source] == "pairs"
    assert abs((draws.source[pairs] == 0).mean() - 2 / 3) < 0.02
    for source, length in enumerate(MIXED.lengths):
        mine = draws.source == source
        assert draws.epoch[mine].max() >= 8
        for epoch in range(4):
            assert sorted(draws.sample[mine & (draws.epoch == epoch)].tolist()) == list(range(length))


def test_a_mixed_stream_is_random_access_and_follows_its_seed():
    whole = MIXED.draw(np.arange(3000))
    shuffled = np.random.default_rng(0).permutation(3000)
    some = MIXED.draw(shuffled)
    for name in ("source", "sample", "epoch"):
        assert np.array_equal(getattr(some, name), getattr(whole, name)[shuffled])
    far = MIXED.draw(np.arange(8 * 10**12, 8 * 10**12 + 8))
    assert len(set(STREAM_OF[far.source])) == 1 and MIXED.name(10**12) == STREAM_OF[far.source[0]]
    other = dataclasses.replace(MIXED, seed=1)
    assert [MIXED.name(step) for step in range(40)] != [other.name(step) for step in range(40)]
    turned = dataclasses.replace(MIXED, shares=dict(reversed(MIXED.shares.items())))
    assert np.array_equal(turned.draw(np.arange(800)).sample, whole.sample[:800])
    seen = {MIXED.replacement(1, 4, 0, attempt) for attempt in range(1, 60)}
    assert seen == set(range(9))


@pytest.mark.parametrize(
    ("members", "shares", "message"),
    [
        (("a", "b"), {"a": 1.0}, "source 1 is of stream 'b', which has no share"),
        (("pair", "text"), {"pairs": 1.0, "text": 1.0}, "source 0 is of stream 'pair'.*did you mean 'pairs'"),
        (("a", None), {"a": 1.0}, "source 1 names no stream; choose from a"),
        (("a", "a"), {"a": 1.0, "b": 1.0}, "no source is of stream 'b'"),
        (("a", "b"), {"a": 1.0, "b": 0.0}, "the share of 'b' must be a positive number, found 0.0"),
        (("a", "b"), {"a": 1.0, "b": -1}, "the share of 'b' must be a positive number, found -1"),
        (("a", "b"), {"a": 1.0, "b": float("nan")}, "the share of 'b' must be a positive number, found nan"),
        (("a", "b"), {}, "source 0 is of stream 'a', which has no share"),
    ],
)
def test_wrong_streams_are_one_line(members, shares, message):
    with pytest.raises(UserError, match=f"^streams: {message}") as error:
        MixedStream((5, 5), (1, 1), members, shares, 4)
    assert "\n" not in str(error.value)
