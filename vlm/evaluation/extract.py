"""Embedding extraction: a data set's image and text embeddings as sharded .npy files, with what each row belongs to.

image-00000-of-00003.npy    float32[rows, D], unit vectors¹       image-00000-of-00003.jsonl   one line per row:
text-00000-of-00012.npy     the same for texts                    {"index", "key"} and, for texts, {"text"}
¹ or the image encoder's class tokens, as they are
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.checkpoint.processes import from_primary, is_primary
from vlm.evaluation.embed import Advance, Embedder, Features, Note
from vlm.evaluation.evaluator import Result, Task
from vlm.evaluation.image_text import texts_of


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """Settings of one extraction.

    Attributes:
      data: a source whose examples have an image and, if `text` is set, texts.
      text: the field with the text or texts to embed as well; None: images only.
      features: of images, see `vlm.evaluation.embed.Features`.
      shard_size: rows per file.
    """

    data: dict[str, Any]
    text: str | None = None
    features: Features = "embedding"
    shard_size: int = 100_000

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size: expected at least 1, found {self.shard_size}")


@dataclasses.dataclass(frozen=True)
class Extract(Task):
    """A prepared extraction; without a folder to write to it counts and measures only."""

    config: ExtractConfig
    folder: Path | None = None

    @property
    def uses_text(self) -> bool:
        """Whether the model's text tower is needed."""
        return self.config.text is not None

    def check(self, embedder: Embedder) -> None:
        """Traces the model; raises UserError where it cannot embed these."""
        embedder.check(texts=self.uses_text, features=self.config.features)

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Embeds everything; the first process writes, and when it cannot, all of them stop."""
        images = _Shards(self.folder, "image", self.config.shard_size)
        texts = _Shards(self.folder, "text", self.config.shard_size)
        count = 0
        try:
            for embeds, notes in embedder.images(self.source, self.note, advance, self.config.features):
                count += len(notes)
                images.add(embeds, [{"index": note["index"], "key": note["key"]} for note in notes])
                rows = [
                    {"index": n["index"], "key": n["key"], "text": text} for n in notes for text in n.get("texts", ())
                ]
                if rows:
                    texts.add(embedder.texts([row["text"] for row in rows]), rows)
            files = images.finish() + texts.finish()
        finally:
            images.discard()
            texts.discard()
        metrics = {"images": float(images.count), "texts": float(texts.count)}
        details = {"data_fingerprint": self.source.fingerprint, "width": images.width, "files": files}
        details["features"] = self.config.features
        return Result("embeddings", metrics, {}, count, len(self.source) - count, details)

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key and texts of an example."""
        note: Note = {"key": str(example.get("key"))}
        return note if self.config.text is None else note | {"texts": texts_of(example, self.config.text)}


class _Shards:
    """Collects rows and writes them in files of equal size, which get their names when their number is known.

    Every process counts, the first one keeps the rows and writes.
    """

    def __init__(self, folder: Path | None, name: str, size: int):
        self.count, self.width = 0, 0
        self._folder, self._name, self._size = folder, name, size
        self._embeds: list[np.ndarray] = []
        self._rows: list[dict[str, Any]] = []
        self._waiting, self._written = 0, 0

    def add(self, embeds: np.ndarray, rows: Sequence[dict[str, Any]]) -> None:
        """Takes some rows."""
        self.count, self.width = self.count + len(rows), embeds.shape[1]
        if self._folder is None:
            return
        if is_primary():
            self._embeds.append(embeds)
            self._rows.extend(rows)
        self._waiting += len(rows)
        while self._waiting >= self._size:
            self._write(self._size)

    def finish(self) -> list[str]:
        """Writes the rest and returns the names of the files that hold embeddings."""
        if self._folder is None:
            return []
        if self._waiting:
            self._write(self._waiting)
        return from_primary(self._give_names)

    def _give_names(self) -> list[str]:
        assert self._folder is not None
        names = []
        for old in self._folder.glob(f"{self._name}-?????-of-?????.*"):
            old.unlink()  # of an earlier extraction, perhaps into another number of files
        for number in range(self._written):
            for suffix in (".jsonl", ".npy"):  # embeddings last: where they are, their rows are described
                name = f"{self._name}-{number:05d}-of-{self._written:05d}{suffix}"
                os.replace(self._part(number, suffix), self._folder / name)
            names.append(name)
        return names

    def discard(self) -> None:
        """Removes what has not got its name."""
        if self._folder is None or not is_primary():
            return
        for number in range(self._written + 1):  # the last one is what could not be written
            for suffix in (".jsonl", ".npy"):
                self._part(number, suffix).unlink(missing_ok=True)

    def _part(self, number: int, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / f".{self._name}-{number:05d}.part{suffix}"

    def _write(self, count: int) -> None:
        from_primary(lambda: self._save(count))
        self._waiting, self._written = self._waiting - count, self._written + 1

    def _save(self, count: int) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        together = np.concatenate(self._embeds)
        rows, self._rows = self._rows[:count], self._rows[count:]
        with self._part(self._written, ".npy").open("wb") as file:
            np.save(file, together[:count])
            os.fsync(file.fileno())
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._part(self._written, ".jsonl").write_text(lines, encoding="utf-8")
        self._embeds = [together[count:]]
