"""Examples of an evaluation as batches on all devices of all hosts, every example exactly once.

Any batch is cut to equal rows per device; rows past the end and unreadable examples are computed like the others, and
whoever asks for results takes those of the other rows (`Fed.valid`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from vlm.data.batch import LoaderSettings
from vlm.data.image import decode
from vlm.data.ledger import FatalDataError
from vlm.data.loader import Loader
from vlm.data.source import Source
from vlm.errors import UserError
from vlm.sharding import local_rows, put_batch

Note = dict[str, Any]
Advance = Callable[[int], None]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Fed:
    """One batch.

    Attributes:
      local: this host's rows of each array.
      start: position in the data of the first row.
      notes: what was kept of each readable example of the whole batch, with its position as "index"; on every host.
    """

    local: dict[str, np.ndarray]
    start: int
    notes: list[Note]

    @property
    def valid(self) -> np.ndarray:
        """Numbers of the rows, of the whole batch, that `notes` belong to."""
        return np.array([note["index"] - self.start for note in self.notes], np.int64)


@dataclasses.dataclass(frozen=True)
class Feed:
    """Where batches go.

    Attributes:
      mesh: None computes on the default device.
      batch_axes: mesh axes that the rows of a batch are split over.
      batch_size: rows over all devices, rounded up to a multiple of them.
      num_workers: threads per host that decode images.
      poll: called on every host before anything goes to the devices; what it raises, on all of them, ends the work.
      max_skip_fraction: share of unreadable examples, of this host, above which `examples` stops.
    """

    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    batch_size: int = 64
    num_workers: int = 2
    poll: Callable[[], None] = lambda: None
    max_skip_fraction: float = 1.0

    @property
    def rows(self) -> int:
        """Rows of a batch over all devices."""
        ways = math.prod(self.mesh.shape[axis] for axis in self.batch_axes) if self.mesh is not None else 1
        return -(-self.batch_size // ways) * ways

    @property
    def replicated(self) -> NamedSharding | None:
        """Puts an array on every device whole, so that every host can read it."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def local_rows(self) -> tuple[int, int]:
        """The rows [start, stop) of a batch that this host holds."""
        return (0, self.rows) if self.mesh is None else local_rows(self._sharding(), self.rows)

    def put(self, arrays: Arrays) -> dict[str, Any]:
        """Puts this host's rows of some arrays on its devices; together the hosts' rows are a batch."""
        self.poll()
        if self.mesh is None:
            return dict(arrays)
        placed = put_batch(arrays, self._sharding(), self.rows)
        return {name: placed[name] for name in arrays}  # in the order given, which jax does not keep

    def put_whole(self, arrays: Arrays) -> dict[str, Any]:
        """The same of arrays that every host has whole."""
        start, stop = self.local_rows()
        return self.put({name: array[start:stop] for name, array in arrays.items()})

    def fetch(self, tree: Any) -> Any:
        """Arrays on the devices as NumPy arrays, whole, on every host."""
        return jax.device_get(tree if self.replicated is None else _place(tree, self.replicated))

    def local(self, array: Any) -> np.ndarray:
        """The rows of this host of an array whose rows are a batch."""
        if self.mesh is None:
            return np.asarray(array)
        split = _place(array, self._sharding())
        parts = {shard.index[0].indices(self.rows)[0]: shard.data for shard in split.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def examples(
        self,
        source: Source,
        transform: Callable[[dict[str, Any]], dict[str, np.ndarray]],
        note: Callable[[dict[str, Any]], Note],
        advance: Advance | None = None,
    ) -> Iterator[Fed]:
        """Yields the readable examples in order, a batch at a time; those that are not readable are named in the log.

        Args:
          transform: arrays of one raw example, without batch axis and of one shape; called from several threads.
          note: what to keep of a raw example, as JSON can hold it. Its position is added as "index".
          advance: called with the number of examples done.

        Raises:
          UserError: on every host, an example of one of them that `note` refuses; more unreadable ones than allowed.
        """
        start, stop = self.local_rows()
        settings = LoaderSettings(
            self.rows,
            num_workers=self.num_workers,
            host_index=start // (stop - start),
            host_count=self.rows // (stop - start),
            max_skip_fraction=self.max_skip_fraction,
        )
        kept: dict[int, Note] = {}
        step_transform = functools.partial(_transform, transform=transform, note=note, kept=kept)
        loader = Loader([_Numbered(source)], step_transform, settings, train=False)
        readable, told, log = 0, 0, logging.getLogger("vlm")
        with loader.iterate() as batches:
            for step, (batch, everyone) in enumerate(_gathered(batches, kept)):
                readable += len(everyone)
                for skip in loader.ledger.entries[told:]:
                    log.warning("%s: left out, it does not count: %s", source.name, skip.error)
                told = len(loader.ledger.entries)
                yield Fed(batch, step * self.rows, [{"index": i, **everyone[i]} for i in sorted(everyone)])
                if advance is not None:
                    advance(min((step + 1) * self.rows, len(source)))
        if not readable:
            found = [f", the first: {skip.error}" for skip in loader.ledger.entries]  # on this host
            raise UserError(f"{source.name}: no image could be read{''.join(found[:1])}")

    def _sharding(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(self.batch_axes))


def pictures_of(example: Mapping[str, Any]) -> Any:
    """The picture of a raw example, or the list of them (a pair, the frames of a video).

    Raises:
      UserError: it has none, or one that cannot be read.
    """
    data = example.get("image")
    if data is None:
        raise UserError(f"example {example.get('key')!r} has no image; it has {', '.join(sorted(example))}")
    name = f"image of {example.get('key')!r}"
    if isinstance(data, (list, tuple)):
        return [decode(item, name=f"{name} [{number}]") for number, item in enumerate(data)]
    return decode(data, name=name)


def trace(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The shapes that a function of arrays gives, without running it.

    Raises:
      UserError: it cannot; `what` says what the model was to do.
    """
    try:
        return jax.eval_shape(function, *arguments)
    except (AttributeError, TypeError, ValueError, AssertionError, FlaxError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"this model and processor cannot {what}: {reason}") from error


def blank_images(count: int | None = None) -> list[Any]:
    """One blank image as a processor takes it, or one list of `count`; to trace a model with."""
    image = Image.new("RGB", (32, 32))
    return [image if count is None else [image] * count]


def _transform(example: dict[str, Any], rng: np.random.Generator, train: bool, *, transform: Any, note: Any, kept: Any):
    del rng, train
    index = example.pop("index")
    try:
        found = note(example)
    except UserError as error:  # a wrong label is no unreadable picture: it must not be skipped
        raise FatalDataError(str(error)) from None
    arrays = transform(example)
    kept[index] = found
    return arrays


@functools.partial(jax.jit, static_argnums=1)
def _place(tree: Any, target: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(tree, target)


class _Numbered:
    """A source whose examples know their position."""

    def __init__(self, source: Source):
        self._source, self.name, self.fingerprint = source, source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "index": index}


def _gathered(batches: Iterator[Any], kept: dict[int, Note]) -> Iterator[tuple[dict[str, np.ndarray], dict[int, Note]]]:
    """Each batch of this host with the notes on the rows of all hosts; where one host fails, all raise."""
    while True:
        batch, notes, failure = None, {}, None
        try:
            if (batch := next(batches, None)) is None:
                return
            index, valid = batch.pop("index"), batch.pop("valid")
            notes = {int(i): kept.pop(int(i)) for i in index[valid]}
        except Exception as error:  # whatever it is, the others must hear of it
            failure = error
        yield batch, _gather(notes, failure)  # type: ignore[misc]


def _gather(notes: dict[int, Note], failure: Exception | None) -> dict[int, Note]:
    """The notes of all hosts, on every host; raises on every host where there is a failure on one of them."""
    if jax.process_count() == 1:
        if failure is not None:
            raise failure
        return notes
    from jax.experimental.multihost_utils import process_allgather

    data = np.zeros(0, np.uint8)
    try:
        data = np.frombuffer(json.dumps(list(notes.items())).encode(), np.uint8)
    except (TypeError, ValueError) as error:
        failure = failure or error
    lengths = np.asarray(process_allgather(np.int32(len(data) if failure is None else -1))).reshape(-1)
    if lengths.min() < 0:
        raise failure or UserError("another host failed and says why")
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    everyone = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    parts = (json.loads(bytes(row[:length])) for row, length in zip(everyone, lengths, strict=True))
    return {int(index): note for part in parts for index, note in part}
