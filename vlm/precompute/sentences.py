"""AltCLIP: what the teacher says of every English sentence of parallel text."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm import sharding
from vlm.data.ledger import FatalDataError
from vlm.data.source import open_sources
from vlm.data.teacher_cache import english, sentence_key
from vlm.data.text import one_text
from vlm.errors import UserError
from vlm.experiment import experiment, make_processor
from vlm.metrics import Progress
from vlm.models.altclip.loss import LossConfig, teacher_targets
from vlm.precompute import running
from vlm.schema import Config


def precompute(settings: Config, output: str, dtype: str, batch_size: int = 128, part_size: int = 1 << 14) -> int:
    """Writes the cache; returns the number of distinct sentences.

    Args:
      batch_size: sentences at a time on each device. part_size: sentences that are kept together.

    Raises:
      UserError: the configuration is not one of teacher learning with a live teacher, or has no parallel text.
    """
    parts = experiment(settings)
    loss = parts.loss_config
    if not isinstance(loss, LossConfig) or loss.objective != "teacher_learning" or loss.teacher is None:
        raise UserError("config.loss: expected objective 'teacher_learning' with a live teacher (loss.teacher)")
    processor = make_processor(settings, parts.family)
    if processor.teacher_tokenizer is None:
        raise UserError("config.processor.teacher_tokenizer is missing")
    sources, _ = open_sources(settings.data.sources)
    mesh = running.own_devices()
    entries = [entry for entry in settings.init if entry.into.split("/")[0] == "extra"]
    extra = parts.init.abstract().extra
    teacher = running.frozen_weights(settings, entries, mesh, "teacher", processor, extra=extra)["extra"]
    embed = running.on_devices(functools.partial(teacher_targets, loss), mesh)

    def rows(sentences: list[str]) -> Any:
        batch = processor.teacher_tokenizer(sentences, max_length=processor.teacher_max_length, padding="max_length")
        return embed(teacher, {f"teacher_{name}": batch[name] for name in ("tokens", "mask")})

    def items(mine: running.Mine) -> running.Items:
        return _sentences(sources, mine, part_size)

    weights = f"{loss.target}:{running.digest(loss.teacher, teacher)}"
    sizes = {"batch_size": batch_size, "part_size": part_size}
    about = running.about(settings, weights, sources, dtype=dtype, **sizes)
    on = sharding.use(mesh, settings.sharding.rules)
    return running.run(output, items, rows, batch_size * mesh.size, about, on)


def training_flags(settings: Config, output: str) -> list[str]:
    """The flags with which training reads the embeddings in the place of the teacher, and does not load it."""
    entries = (entry for entry in settings.init if entry.into.split("/")[0] != "extra")
    kept = tuple({"path": entry.path, "into": entry.into, "include": entry.include} for entry in entries)
    flags = {"data.teacher_cache": output, "loss.teacher": None, "processor.teacher_tokenizer": None, "init": kept}
    return [f"--config.{name}={value}" for name, value in flags.items()]


def _sentences(sources: Sequence[Any], mine: running.Mine, part_size: int) -> Iterator[tuple[int, Any, str]]:
    """Every distinct English sentence, in order, as an item of `running`: it names itself. All hosts read all text."""
    known: set[bytes] = set()
    for text in _texts(sources):
        if (key := sentence_key(text)) not in known:
            part = len(known) // part_size
            known.add(key)
            yield part, text if mine(part) else None, text


def _texts(sources: Sequence[Any]) -> Iterator[str]:
    """The English side of every pair, all of its sentences where it has several, with a line of progress."""
    progress = Progress(sum(map(len, sources)), enabled=jax.process_index() == 0, unit="pair")
    records = ((source, index) for source in sources for index in range(len(source)))
    with contextlib.closing(progress):
        for done, (source, index) in enumerate(records, start=1):
            progress.moved(done)
            try:
                record = source[index]
            except FatalDataError:
                raise
            except UserError as error:  # training replaces such an example too
                print(f"left out: {source.name}, record {index}: {error}", file=sys.stderr)
                continue
            for choice in _choices(record):
                try:
                    text = english({"source_text": one_text(choice, None, "`source_text`")})
                except UserError as error:  # as is one of which this sentence is drawn
                    print(f"left out: {source.name}, record {index}: {error}", file=sys.stderr)
                    continue
                yield text


def _choices(record: Mapping[str, Any]) -> Sequence[Any]:
    """What training draws one of (`one_text`): each item of a list as a list of its own, or the whole."""
    value = record.get("source_text")
    if isinstance(value, (list, tuple, np.ndarray)) and len(value):
        return [[item] for item in value]
    return [value]
