"""Which example comes at which position: pure functions of (seed, position), for any position, in constant memory.

Training: position -> (source, sample, epoch). Positions fall into blocks; inside each block every source gets its
exact share, in an order permuted per block. The n-th draw of a source is element `n % len` of that source's own
permutation for epoch `n // len`, so that an epoch holds every sample once. Evaluation: all samples once, in order.

Permutations are Feistel networks over the smallest power of two, walked until inside the range (Black & Rogaway,
"Ciphers with arbitrary finite domains", 2002); the round function is the finaliser of splitmix64 (Steele, Lea &
Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from vlm.errors import UserError
from vlm.schema import check_streams

_MAX_BLOCK = 1 << 16
_MIN_BLOCK = 64
_ROUNDS = 6

Word = np.ndarray | np.uint64


@dataclasses.dataclass(frozen=True)
class Draws:
    """What stands at each asked position; `valid` is false past the end of an evaluation stream."""

    source: Int[np.ndarray, " n"]
    sample: Int[np.ndarray, " n"]
    epoch: Int[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]


def mix(*words: int | Word) -> np.ndarray:
    """Hashes integers (arrays broadcast) to uint64; every word changes every bit."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for word in words:
            word = np.asarray(word).astype(np.uint64)
            state = _finalise(state ^ (word * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)))
    return np.asarray(state)


def _finalise(x: Word) -> Word:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Int[np.ndarray, " n"], size: int, key: Word) -> Int[np.ndarray, " n"]:
    """Returns where a permutation of `range(size)` sends each index; `key` (uint64[] or [n]) chooses it.

    For a fixed key this is a bijection. Takes O(1) memory and time per element whatever the size.
    """
    if size == 1:
        return np.zeros_like(index)
    bits = max(4, int(size - 1).bit_length())
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    key = np.broadcast_to(np.asarray(key, np.uint64), np.shape(index))
    result = np.array(index, np.uint64)
    walking = np.arange(len(result))
    with np.errstate(over="ignore"):
        while len(walking):
            moved = _feistel(result[walking], key[walking], int(low), int(high))
            result[walking] = moved
            walking = walking[moved >= np.uint64(size)]
    return result.astype(np.int64)


def _feistel(x: np.ndarray, key: np.ndarray, low: int, high: int) -> np.ndarray:
    """One pass of a Feistel network over `low + high` bits whose halves change places (and widths) every round."""
    for number in range(_ROUNDS):
        right_bits = low if number % 2 == 0 else high
        left_bits = low + high - right_bits
        right = x & np.uint64((1 << right_bits) - 1)
        left = x >> np.uint64(right_bits)
        noise = _finalise((right + key) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number + 1))
        left = left ^ (noise >> np.uint64(64 - left_bits))
        x = (right << np.uint64(left_bits)) | left
    return x


def block_counts(weights: Sequence[float]) -> Int[np.ndarray, " n"]:
    """How often each stands in one block: the weights exactly where a block of at most 65,536 can hold them.

    Raises:
        UserError: a weight is below 1/65,536 of all, but not zero.
    """
    shares = np.asarray(weights, np.float64) / sum(weights)
    for size in range(1, 4097):
        counts = np.rint(shares * size)
        if counts.sum() == size and np.abs(counts / size - shares).max() < 1e-12:
            # One alone needs no mixing; small blocks are repeated so that the order varies.
            scale = 1 if size == 1 else -(-_MIN_BLOCK // size)
            return (counts * scale).astype(np.int64)
    counts = np.floor(shares * _MAX_BLOCK)
    rest = np.argsort(counts - shares * _MAX_BLOCK, kind="stable")[: int(_MAX_BLOCK - counts.sum())]
    counts[rest] += 1
    lost = np.flatnonzero((counts == 0) & (shares > 0))
    if len(lost):
        raise UserError(f"mixture: weight {weights[lost[0]]} of source {lost[0]} is below 1/{_MAX_BLOCK}")
    return counts.astype(np.int64)


def deal(
    positions: Int[np.ndarray, " n"], counts: Int[np.ndarray, " m"], key: tuple[int, ...]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Deals positions out in blocks that hold choice `c` exactly `counts[c]` times, in an order permuted per block.

    Returns:
        the choice at each position, and which of its turns that is: over all positions a choice gets every turn once.
    """
    ends = np.cumsum(counts)
    block, place = np.divmod(positions, ends[-1])
    slot = permute(place, int(ends[-1]), mix(*key, block))
    choice = np.searchsorted(ends, slot, side="right")
    return choice, block * counts[choice] + slot - (ends - counts)[choice]


@dataclasses.dataclass(frozen=True)
class TrainStream:
    """Endless mixture of shuffled sources.

    Attributes:
        lengths: number of samples of each source.
        weights: share of each source in the stream, any positive scale; zero leaves a source out.
        seed: chooses every permutation.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int = 0

    def __post_init__(self):
        if len(self.lengths) != len(self.weights) or not self.lengths:
            raise UserError(f"mixture: {len(self.lengths)} sources but {len(self.weights)} weights")
        if not all(np.isfinite(w) and w >= 0 for w in self.weights) or sum(self.weights) <= 0:
            raise UserError(f"mixture: weights must be finite, not negative, not all zero, found {list(self.weights)}")
        if min(self.lengths) < 1:
            raise UserError(f"mixture: source {self.lengths.index(min(self.lengths))} is empty")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be in [0, 2^63), found {self.seed}")

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, " sources"]:
        """Draws of each source in one block."""
        return block_counts(self.weights)

    def draw(self, positions: Int[np.ndarray, " n"]) -> Draws:
        """Returns what stands at the given positions of the stream (any order, any subset)."""
        source, turn = deal(np.asarray(positions, np.int64), self.counts, (self.seed, 1))
        sample, epoch = np.empty_like(turn), np.empty_like(turn)
        for number in range(len(self.lengths)):
            mine = source == number
            if mine.any():
                epoch[mine], place = np.divmod(turn[mine], self.lengths[number])
                keys = mix(self.seed, 2, number, epoch[mine])
                sample[mine] = permute(place, self.lengths[number], keys)
        return Draws(source, sample, epoch, np.ones(len(positions), bool))

    def replacement(self, source: int, sample: int, epoch: int, attempt: int) -> int:
        """Returns the sample that stands in for an unreadable one; attempts count from 1."""
        return int(mix(self.seed, 3, source, epoch, sample, attempt) % np.uint64(self.lengths[source]))


@dataclasses.dataclass(frozen=True)
class MixedStream:
    """Streams that take turns batch by batch: every batch is drawn whole from one of them.

    Which one is a function of (seed, step) alone, with exact shares in every block of steps. The n-th batch of a stream
    holds positions n · batch_size, … of its own `TrainStream`, whose turns are those of the other streams left out.

    Attributes:
        lengths, weights: of all sources; weights compare sources of one stream only.
        members: name of the stream that each source belongs to.
        shares: share of the steps of each stream by name, any positive scale.
        batch_size: rows of a batch.
        seed: chooses every permutation.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    members: tuple[str, ...]
    shares: Mapping[str, float]
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        check_streams(self.members, self.shares)
        _ = self._streams  # wrong weights are refused now, not at the first batch

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The streams, in alphabetical order: that of a configuration's keys must not matter."""
        return tuple(sorted(self.shares))

    @functools.cached_property
    def counts(self) -> Int[np.ndarray, " streams"]:
        """Batches of each stream in one block of steps."""
        return block_counts([self.shares[name] for name in self.names])

    @functools.cached_property
    def _streams(self) -> list[tuple[Int[np.ndarray, " sources"], TrainStream]]:
        """Of each stream, the numbers of its sources and its own stream."""
        found = []
        for number, name in enumerate(self.names):
            sources = np.flatnonzero([member == name for member in self.members])
            lengths, weights = tuple(self.lengths[i] for i in sources), tuple(self.weights[i] for i in sources)
            found.append((sources, TrainStream(lengths, weights, int(mix(self.seed, 5, number)) >> 1)))
        return found

    def draw(self, positions: Int[np.ndarray, " n"]) -> Draws:
        """Returns what stands at the given positions (any order, any subset)."""
        step, row = np.divmod(np.asarray(positions, np.int64), self.batch_size)
        choice, turn = deal(step, self.counts, (self.seed, 4))
        source, sample, epoch = (np.empty_like(step) for _ in range(3))
        for number, (sources, stream) in enumerate(self._streams):
            mine = choice == number
            if mine.any():
                draws = stream.draw(turn[mine] * self.batch_size + row[mine])
                source[mine], sample[mine], epoch[mine] = sources[draws.source], draws.sample, draws.epoch
        return Draws(source, sample, epoch, np.ones(len(step), bool))

    def replacement(self, source: int, sample: int, epoch: int, attempt: int) -> int:
        """Returns the sample that stands in for an unreadable one; attempts count from 1."""
        return int(mix(self.seed, 3, source, epoch, sample, attempt) % np.uint64(self.lengths[source]))

    def name(self, step: int) -> str:
        """The stream that the batch of a step (from 0) comes from."""
        return self.names[int(deal(np.array([step]), self.counts, (self.seed, 4))[0][0])]

    def steps(self, count: int) -> dict[str, int]:
        """How many of the first `count` batches come from each stream."""
        size = int(self.counts.sum())
        first = count // size * size
        rest = deal(np.arange(first, count), self.counts, (self.seed, 4))[0]
        totals = count // size * self.counts + np.bincount(rest, minlength=len(self.names))
        return dict(zip(self.names, totals.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class EvalStream:
    """Every sample of every source once, in order; positions past the end repeat sample 0 with `valid` false."""

    lengths: tuple[int, ...]
    seed: int = 0

    def __len__(self) -> int:
        return sum(self.lengths)

    def draw(self, positions: Int[np.ndarray, " n"]) -> Draws:
        """Returns what stands at the given positions."""
        positions = np.asarray(positions, np.int64)
        valid = positions < len(self)
        positions = np.where(valid, positions, 0)
        ends = np.cumsum(self.lengths)
        source = np.searchsorted(ends, positions, side="right")
        sample = positions - (ends - np.asarray(self.lengths))[source]
        return Draws(source, sample, np.zeros_like(positions), valid)

    def replacement(self, source: int, sample: int, epoch: int, attempt: int) -> int:
        """Returns a sample that can fill the row of an unreadable one (the row is marked invalid)."""
        return int(mix(self.seed, 3, source, epoch, sample, attempt) % np.uint64(self.lengths[source]))
