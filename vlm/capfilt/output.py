"""The folder that CapFilt fills: settings, filtered shards, what was counted in each, and the sum.

capfilt.json      what the texts depend on (models, threshold, sampling, seed); written first, never changed
NAME.tar          surviving pairs of input shard NAME.tar, absent if there are none
NAME.json         counts of that shard with the SHA-256 of its output, written last: where it is, the shard is finished
skipped.jsonl     images that could not be read
statistics.json   the sum over all shards, when all are finished
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.shards import expand
from vlm.errors import UserError
from vlm.manifest import write_atomically

FORMAT_VERSION = 1
SETTINGS, STATISTICS = "capfilt.json", "statistics.json"
BINS = 20
"""Of the histograms of matching probabilities: equal parts of [0, 1]."""
SCORED = ("web", "synthetic")
PROVENANCES = (*SCORED, "human")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One input shard; `human` ones pass without captions and filter."""

    path: Path
    human: bool

    @property
    def name(self) -> str:
        """Of the output: without "-of-00128", because a shard in which nothing survives is absent."""
        name = self.path.name.removesuffix(".tar")
        return ("human-" if self.human else "") + re.sub(r"-of-\d{5,}", "", name)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size


def input_shards(web: Sequence[str], human: Sequence[str], output: Path) -> list[Shard]:
    """All shards of a run in order.

    Raises:
      UserError: a shard is missing or empty, two would have one output, or they lie in the output folder.
    """
    shards = [Shard(Path(path), False) for path in expand(list(web))]
    shards += [Shard(Path(path), True) for path in expand(list(human))] if human else []
    seen: dict[str, Path] = {}
    for shard in shards:
        if shard.path.resolve().parent == output.resolve():
            raise UserError(f"--output: expected another folder than that of the input {shard.path}")
        if shard.name in seen or f"{shard.name}.json" in (SETTINGS, STATISTICS):
            other = seen.get(shard.name, f"{shard.name}.json of the run itself")
            raise UserError(f"{shard.path}: its output {shard.name} would be that of {other}")
        seen[shard.name] = shard.path
    return shards


def check_folder(folder: Path) -> None:
    """Refuses an output folder with anything but a run of this command in it. Creates nothing.

    Raises:
      UserError: it holds something else, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: not a folder: {folder}")
    # Hidden files are what other processes of this run, or killed ones, are writing or have left.
    there = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if there and not (folder / SETTINGS).is_file():
        raise UserError(f"--output: {folder} holds other files and no {SETTINGS}; give a new folder")


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes down what the run's results depend on, or compares with what is written.

    Raises:
      UserError: the folder holds a run with other settings, or cannot be written.
    """
    path = folder / SETTINGS
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, indent=1).encode())
        except OSError as error:
            raise UserError(f"--output: cannot write to {folder}: {error.strerror}") from None
    found = _read(path)
    for name in sorted({*settings, *found}):
        here, there = found.get(name), json.loads(json.dumps(settings.get(name)))
        if here != there:
            raise UserError(
                f"--output: {folder} holds a run with another {name} ({_short(here)}, now {_short(there)}); "
                "give a new folder"
            )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else json.dumps(value)


def finished(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """The counts of a finished shard; None if it is still to be done (or its output has since been lost).

    Raises:
      UserError: it was made from another input.
    """
    path, output = folder / f"{shard.name}.json", folder / f"{shard.name}.tar"
    if not path.is_file():
        return None
    counts = _read(path)
    if counts.get("source_bytes") != shard.size:
        raise UserError(
            f"{path}: made from a shard of {counts.get('source_bytes')} bytes, {shard.path} has {shard.size}; "
            "give a new --output"
        )
    there = output.stat().st_size if output.is_file() else 0
    return counts if there == counts.get("bytes") else None


def write_counts(folder: Path, shard: Shard, counts: Mapping[str, Any]) -> None:
    """Marks a shard as finished.

    Raises:
      UserError: there is no space, for instance.
    """
    _write(folder / f"{shard.name}.json", counts)


def total(folder: Path, shards: Sequence[Shard]) -> dict[str, Any]:
    """The sum over the finished shards of all processes, written to statistics.json if no shard is missing.

    Returns:
      "shards", "finished", and what `describe` returns.
    """
    done = [counts for shard in shards if (counts := finished(folder, shard)) is not None]
    result = {"shards": len(shards), "finished": len(done), **describe(map(restore, done))}
    if len(done) == len(shards):
        _write(folder / STATISTICS, {"format_version": FORMAT_VERSION, **result})
    return result


def _write(path: Path, counts: Mapping[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(counts, indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or value.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: expected an object of format version {FORMAT_VERSION}")
    return value


@dataclasses.dataclass
class Counts:
    """What happened to the images and texts of one shard."""

    images: int = 0
    unreadable: int = 0
    texts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PROVENANCES, 0))
    kept: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(PROVENANCES, 0))
    histogram: dict[str, list[int]] = dataclasses.field(default_factory=lambda: {name: [0] * BINS for name in SCORED})

    def add(self, provenance: str, kept: bool, probability: float | None = None) -> None:
        """Counts one text."""
        self.texts[provenance] += 1
        self.kept[provenance] += kept
        if probability is not None:
            self.histogram[provenance][min(int(probability * BINS), BINS - 1)] += 1


def describe(counts: Iterable[Counts]) -> dict[str, Any]:
    """The counts, summed, with what follows from them.

    Returns:
      images (readable), unreadable, records (surviving texts), texts_per_image, human_texts; for "web" and "synthetic"
      texts: texts, kept, noise_ratio (share removed, None without texts) and histogram of their probabilities.
    """
    counts = list(counts)
    images = sum(one.images for one in counts)
    records = sum(sum(one.kept.values()) for one in counts)
    result: dict[str, Any] = {"images": images, "unreadable": sum(one.unreadable for one in counts)}
    for name in SCORED:
        texts, kept = (sum(getattr(one, field)[name] for one in counts) for field in ("texts", "kept"))
        ratio = round(1 - kept / texts, 6) if texts else None
        histogram = [sum(bins) for bins in zip(*(one.histogram[name] for one in counts), strict=True)] or [0] * BINS
        result[name] = {"texts": texts, "kept": kept, "noise_ratio": ratio, "histogram": histogram}
    result["human_texts"] = sum(one.texts["human"] for one in counts)
    return result | {"records": records, "texts_per_image": round(records / images, 6) if images else None}


def restore(described: Mapping[str, Any]) -> Counts:
    """The counts behind a description of one shard."""
    human = described["human_texts"]
    texts = {name: described[name]["texts"] for name in SCORED} | {"human": human}
    kept = {name: described[name]["kept"] for name in SCORED} | {"human": human}
    histogram = {name: list(described[name]["histogram"]) for name in SCORED}
    return Counts(described["images"], described["unreadable"], texts, kept, histogram)
