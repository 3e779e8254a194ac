"""The loader: raw examples to batches on threads, with one integer (the step) as its whole state.

Row `r` of global batch `s` is position `s * batch_size + r` of the stream, whatever the number of workers and
hosts; host `h` of `H` gets the `h`-th of `H` equal runs of rows, the order in which `jax` puts process-local data
together. Image decoding and resizing release the interpreter lock, so threads are enough, and nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.batch import LoaderSettings, Row
from vlm.data.ledger import FatalDataError, Skip, SkipLedger, digest
from vlm.data.prefetch import Batches
from vlm.data.sampling import EvalStream, MixedStream, TrainStream
from vlm.data.source import Source
from vlm.errors import UserError

Transform = Callable[[dict[str, Any], np.random.Generator, bool], dict[str, np.ndarray]]
_MAX_ATTEMPTS = 100


class Loader:
    """Makes batches of `transform(example, rng, train)` from sources.

    Args:
        sources: see `source.open_sources`.
        transform: maps a raw example to arrays without batch axis; called from several threads at once. A
            `UserError` or `OSError` that it raises makes the example unreadable: it is written to the ledger and
            replaced. Anything else it raises stops the run. `rng` depends on (seed, epoch, source, sample) alone.
            In training an example that lacks arrays which the first of its source gives is unreadable too.
        settings: see `LoaderSettings`.
        weights: shares of the sources; None means their sizes. Only for training.
        members, shares: the stream that each source belongs to, and the share of steps of each stream, by name: every
            training batch then comes whole from one stream (see `sampling.MixedStream`). None: one mixture.
        train: an endless shuffled mixture; otherwise one ordered pass whose batches also hold `index` (int32[B],
            position in the pass, -1 past the end) and `valid` (bool[B], false past the end and for unreadable
            examples), padded so that every batch of every host has the same shape.
        ledger: folder of the skip ledger, or None to keep it in memory.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        transform: Transform,
        settings: LoaderSettings,
        *,
        weights: Sequence[float] | None = None,
        members: Sequence[str] | None = None,
        shares: Mapping[str, float] | None = None,
        train: bool = True,
        ledger: str | os.PathLike | None = None,
    ):
        self.sources, self.transform, self.settings, self.train = list(sources), transform, settings, train
        lengths = tuple(len(source) for source in self.sources)
        parts = tuple(map(float, lengths if weights is None else weights))
        mixed = (tuple(members or ()), dict(shares)) if shares else None
        self.stream: TrainStream | MixedStream | EvalStream
        if train and mixed:
            self.stream = MixedStream(lengths, parts, *mixed, settings.batch_size, settings.seed)
        elif train:
            self.stream = TrainStream(lengths, parts, settings.seed)
        elif weights is not None and len(set(parts)) > 1:
            raise UserError("an evaluation stream reads every example once and takes no weights")
        else:
            self.stream = EvalStream(lengths, settings.seed)
        self.ledger = SkipLedger(ledger, settings.host_index)
        self._usual: dict[int, frozenset[str]] = {}
        identity = [settings.batch_size, settings.seed, train, parts, [s.fingerprint for s in self.sources]]
        identity.append(getattr(transform, "fingerprint", ""))  # what the transform joins from elsewhere
        identity += [mixed[0], sorted((name, float(share)) for name, share in mixed[1].items())] if mixed else []
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    @property
    def num_steps(self) -> int | None:
        """Batches of one evaluation pass; None for training."""
        return None if self.train else -(-len(self.stream) // self.settings.batch_size)  # pyright: ignore

    @property
    def steps_of_streams(self) -> Callable[[int], dict[str, int]] | None:
        """How many of the first n batches come from each stream, as a function of n; None without streams."""
        return self.stream.steps if isinstance(self.stream, MixedStream) else None

    def iterate(self, start_step: int = 0) -> Batches:
        """Returns the batches from `start_step` on; close it (or use `with`) to stop its threads."""
        if start_step < 0:
            raise UserError(f"start_step must not be negative, found {start_step}")
        return Batches(self, start_step)

    def draws(self, step: int) -> list[tuple[int, int, int, int, bool]]:
        """Returns (position, source, sample, epoch, valid) of this host's rows of one batch."""
        first = step * self.settings.batch_size + self.settings.host_index * self.settings.rows
        positions = np.arange(first, first + self.settings.rows)
        draws = self.stream.draw(positions)
        columns = (positions, draws.source, draws.sample, draws.epoch, draws.valid)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def load_row(self, position: int, source: int, sample: int, epoch: int, valid: bool) -> Row:
        """Reads and transforms the example of one row, or the one that stands in for it.

        Raises:
            UserError: no replacement could be read either.
        """
        skips: list[Skip] = []
        current = sample
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            example = None
            try:
                example = self.sources[source][current]
                arrays = self._transformed(example, source, current, epoch)
                if self.train and (lacking := self._names(source) - arrays.keys()):
                    raise UserError(f"gives no {', '.join(sorted(lacking))}, unlike the first of its source")
                break
            except FatalDataError:
                raise
            except UserError as error:
                problem = error
            except OSError as error:
                if example is None:
                    raise  # the storage fails, not the example: skipping would make the stream depend on luck
                problem = error
            key = str(example["key"]) if example else ""
            line = " ".join(f"{problem}".split()) or type(problem).__name__
            skips.append(Skip(self.sources[source].name, current, key, line[:500], digest(example)))
            current = self.stream.replacement(source, sample, epoch, attempt)
        else:
            name = self.sources[source].name
            raise UserError(f"{name}: {_MAX_ATTEMPTS} replacements of sample {sample} are unreadable too: {line}")
        if not self.train:
            arrays |= {"index": np.int32(position if valid else -1), "valid": np.bool_(valid and not skips)}
        label = f"example {example['key']!r} (source {self.sources[source].name}, sample {current})"
        return Row(label, arrays, tuple(skips) if valid else ())

    def _names(self, source: int) -> frozenset[str]:
        """The arrays that the first readable example of a source gives: of the data alone, so the same on all hosts."""
        if source not in self._usual:  # threads that meet here find the same
            names: frozenset[str] = frozenset()
            for sample in range(min(_MAX_ATTEMPTS, len(self.sources[source]))):
                with contextlib.suppress(UserError, OSError):
                    names = frozenset(self._transformed(self.sources[source][sample], source, sample, 0))
                    break
            self._usual[source] = names
        return self._usual[source]

    def _transformed(self, example: dict[str, Any], source: int, sample: int, epoch: int) -> dict[str, Any]:
        # Counter-based, so that the numbers of one example never overlap those of another.
        bits = np.random.Philox(key=self.settings.seed, counter=[0, epoch, source, sample])
        try:
            arrays = self.transform(example, np.random.Generator(bits), self.train)
        except (UserError, OSError):
            raise
        except Exception as error:
            error.add_note(f"while transforming {example['key']!r} of {self.sources[source].name}, sample {sample}")
            raise
        return {name: np.asarray(value) for name, value in arrays.items()}
