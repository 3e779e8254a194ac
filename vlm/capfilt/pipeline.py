"""From one input shard to one output shard: read, caption, filter, write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm.capfilt.models import Captioner, Filter, keys
from vlm.capfilt.output import FORMAT_VERSION, Counts, Shard, describe
from vlm.data.batch import LoaderSettings
from vlm.data.image import ImageSettings, decode, process
from vlm.data.ledger import SkipLedger
from vlm.data.loader import Loader
from vlm.data.tar import TarSource
from vlm.data.tar_writer import TarWriter
from vlm.data.text import clean_caption
from vlm.errors import UserError
from vlm.strict import plain

MAX_TEXTS = 16
"""Texts of one image; a record with more is not a caption file."""
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp"}

Candidate = tuple[str, str]
"""Provenance and text."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the surviving texts depend on beside the models.

    Attributes:
      threshold: a text stays if its matching probability is at least this.
      seed: of the captions.
      max_words: words kept of a cleaned text.
      fields: names in the records of image and text (`data.fields.FieldMap`); None: the usual names.
      score_only: count, write no shards.
    """

    threshold: float = 0.5
    seed: int = 0
    max_words: int = 30
    fields: dict[str, str] | None = None
    score_only: bool = False


@dataclasses.dataclass
class Limit:
    """Stops a run with too many unreadable images; counts all shards that this process has seen."""

    max_fraction: float
    seen: int = 0
    unreadable: int = 0

    def check(self, seen: int, unreadable: int) -> None:
        """Raises `UserError` if, with so many more, too many are unreadable. One bad image of a few is none."""
        seen, unreadable = self.seen + seen, self.unreadable + unreadable
        if unreadable > self.max_fraction * max(seen, LoaderSettings.skip_window):
            raise UserError(
                f"{unreadable} of {seen} images were unreadable, more than --max_skip_fraction={self.max_fraction:g} "
                "allows; they are listed in skipped.jsonl"
            )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Makes output shards one at a time; memory holds a few batches, whatever the size of a shard.

    Attributes:
      folder: where outputs go.
      captioner, filter: see `models`.
      rows: images of every batch, the last one of a shard filled up.
      num_workers: threads that read and decode.
      ledger: where unreadable images are written down.
    """

    folder: Path
    captioner: Captioner
    filter: Filter
    settings: Settings
    rows: int
    num_workers: int
    ledger: SkipLedger
    limit: Limit

    def run(self, shard: Shard, advance: Callable[[float, int], None]) -> dict[str, Any]:
        """Makes one output shard and returns its counts, to be written down by the caller.

        Args:
          advance: called with the share of the shard that is done, and the images done since the last call.

        Raises:
          UserError: a damaged shard, too many unreadable images, or the output cannot be written.
        """
        source = TarSource.single(str(shard.path), fields=self.settings.fields, name=shard.path.name)
        counts = Counts()
        if self.settings.score_only:
            for _ in self._pairs(shard, source, counts, advance):
                pass
            written = (0, "")
        else:
            with TarWriter(self.folder / f"{shard.name}.tar") as writer:
                for key, members in self._pairs(shard, source, counts, advance):
                    writer.add(key, members)
                written = writer.finish()
        self.limit.seen += counts.images + counts.unreadable
        self.limit.unreadable += counts.unreadable
        about = {"format_version": FORMAT_VERSION, "source": shard.path.name, "source_bytes": shard.size}
        return about | describe([counts]) | {"bytes": written[0], "sha256": written[1]}

    def _pairs(
        self, shard: Shard, source: TarSource, counts: Counts, advance: Callable[[float, int], None]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The surviving pairs of a shard as members of the output, in the order of the input."""
        reader = _Reader(self.settings.max_words, self._image_settings(shard))
        settings = LoaderSettings(self.rows, num_workers=self.num_workers, max_skip_fraction=1.0)
        loader = Loader([_Numbered(source)], reader, settings, train=False)
        loader.ledger = self.ledger  # one for all shards, named after this process
        with loader.iterate() as batches:
            for batch in batches:
                rows = zip(batch["index"].tolist(), batch["valid"], strict=True)
                found = [reader.raw.pop(index) if valid else None for index, valid in rows]
                there, readable = int((batch["index"] >= 0).sum()), int(batch["valid"].sum())
                counts.images += readable
                counts.unreadable += there - readable
                self.limit.check(counts.images + counts.unreadable, counts.unreadable)
                yield from self._survivors(shard, batch, found, counts)
                advance((counts.images + counts.unreadable) / len(source), there)

    def _image_settings(self, shard: Shard) -> dict[str, ImageSettings]:
        """The arrays that a batch needs; one serves both models where they see the same."""
        if shard.human:
            return {}
        one, other = self.captioner.image_settings, self.filter.image_settings
        return {"captioner": one} if one == other else {"captioner": one, "filter": other}

    def _survivors(
        self, shard: Shard, batch: dict[str, np.ndarray], found: list[_Raw | None], counts: Counts
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        if shard.human:
            for raw in filter(None, found):
                for number, text in enumerate(raw.texts):
                    counts.add("human", True)
                    yield _record(raw, ("human", text), number, None)
            return
        draws = keys(self.settings.seed, shard.name, np.maximum(batch["index"], 0))
        captions = self.captioner(batch["captioner"], draws)
        states = self.filter.encode(batch.get("filter", batch["captioner"]))
        candidates = [
            [*(("web", text) for text in raw.texts), *([("synthetic", caption)] if caption else [])] if raw else []
            for raw, caption in zip(found, captions, strict=True)
        ]
        slots = [
            self.filter([row[slot][1] if slot < len(row) else "" for row in candidates], states)
            for slot in range(max(map(len, candidates)))
        ]
        for number, (raw, row) in enumerate(zip(found, candidates, strict=True)):
            for slot, candidate in enumerate(row):
                probability = float(str(slots[slot][number]))  # as few digits as tell it from its neighbours
                keep = probability >= self.settings.threshold
                counts.add(candidate[0], keep, probability)
                if keep and raw:
                    yield _record(raw, candidate, slot if candidate[0] == "web" else 0, probability)


@dataclasses.dataclass(frozen=True)
class _Raw:
    """What is kept of an input record until its batch is written."""

    key: str
    image: bytes
    texts: list[str]


class _Reader:
    """The loader's transform: decodes a record's image; the record itself waits in `raw`."""

    def __init__(self, max_words: int, settings: dict[str, ImageSettings]):
        self.raw: dict[int, _Raw] = {}
        self._max_words, self._settings = max_words, settings

    def __call__(self, example: dict[str, Any], rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        del rng, train
        data, key = example.get("image"), str(example["key"])
        if not isinstance(data, bytes):
            raise UserError(f"example {key!r} has no image; it has {', '.join(sorted(example))}")
        picture = decode(data, name=f"image of {key!r}")
        texts = _texts(example.get("text"), key, self._max_words)
        self.raw[example["index"]] = _Raw(key, data, texts)
        return {name: process(picture, settings) for name, settings in self._settings.items()}


def _texts(value: Any, key: str, max_words: int) -> list[str]:
    """The different cleaned texts of a record; none is no error."""
    values = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) > MAX_TEXTS or not all(isinstance(text, str) for text in values):
        raise UserError(f"text of {key!r}: expected a string or at most {MAX_TEXTS} of them, found {value!r:.80}")
    cleaned = [clean_caption(text, max_words) for text in values]
    try:
        "".join(cleaned).encode()
    except UnicodeEncodeError:
        raise UserError(f"text of {key!r}: not valid Unicode") from None
    return list(dict.fromkeys(text for text in cleaned if text.strip()))


def _record(raw: _Raw, candidate: Candidate, number: int, probability: float | None) -> tuple[str, dict[str, bytes]]:
    """Key and members of one pair in the output."""
    provenance, text = candidate
    about = {"key": raw.key, "provenance": provenance}
    about |= {} if probability is None else {"probability": probability}
    members = {_MAGIC[raw.image[:3]]: raw.image, "txt": text.encode(), "json": json.dumps(about).encode()}
    return f"{raw.key}-{provenance}" + (f"-{number}" if number else ""), members


class _Numbered:
    """A source whose examples know their position."""

    def __init__(self, source: TarSource):
        self._source, self.name, self.fingerprint = source, source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "index": index}


def recorded(settings: Settings, generation: Any, prompt: str, models: dict[str, str]) -> dict[str, Any]:
    """What `output.claim_folder` writes down."""
    return {"format_version": FORMAT_VERSION, **models, "prompt": prompt, **plain(generation), **plain(settings)}
