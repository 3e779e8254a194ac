"""FLAVA: the visual words that the codebook gives to every picture."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vlm import sharding
from vlm.config import build
from vlm.data.ledger import FatalDataError
from vlm.data.source import open_sources
from vlm.data.teacher_cache import Key, picture_key
from vlm.errors import UserError
from vlm.experiment import make_processor
from vlm.loading import expected_params
from vlm.metrics import Progress
from vlm.models import get_family
from vlm.precompute import running
from vlm.schema import Config
from vlm.tree import flatten

_AHEAD = 8
"""Records that are being read or wait to be taken, for each thread."""


def precompute_words(settings: Config, output: str, batch_size: int = 128, part_size: int = 1 << 14) -> int:
    """Writes the visual words of all pictures; returns their number.

    Args:
      batch_size: pictures at a time on each device. part_size: records that are computed and kept together.

    Raises:
      UserError: the model has no codebook or no checkpoint gives it, pictures are cropped at random, or there are none.
    """
    family = get_family(settings.family)
    config = build(family.config_type, settings.model, "model")
    if config.codebook is None:
        raise UserError("config.model.codebook: expected the codebook, found None")
    if settings.processor.get("augment") is not None:
        raise UserError("config.processor.augment: expected None, found random crops, whose words would be others")
    processor = make_processor(settings, family)
    side, expected = processor.config.codebook_size, config.codebook_size
    if side is None or expected not in (None, side):
        raise UserError(f"config.processor.codebook_size: expected {expected or 'the side of pictures'}, found {side}")
    measured = (spec["data"] for spec in settings.eval.values() if spec["kind"] == "losses")
    specs = [spec for spec in (*settings.data.sources, *measured) if "image" in spec.get("fields", ("image",))]
    if not specs:
        raise UserError("config.data.sources: expected pictures, found no source with an image field")
    sources, _ = open_sources(specs)
    alone = dict.fromkeys(("vision", "text", "fusion", "projection_dim", "classifier"), None)
    model = family.module(dataclasses.replace(config, **alone, heads=False))
    mesh = running.own_devices()
    params = _codebook(settings, model, mesh)
    labels = running.on_devices(lambda x, image: model.apply(x, image, method=model.codebook_labels), mesh)

    def rows(images: list[Any]) -> Any:
        return labels({"params": params}, np.stack(images))

    def items(mine: running.Mine) -> running.Items:
        return pictures(sources, processor, mine, part_size, settings.data.num_workers)

    weights = f"codebook:{running.digest(config.codebook, params)}"
    sizes = {"batch_size": batch_size, "part_size": part_size}
    options = {"dtype": "uint16", "vocab_size": config.image_vocab_size}
    about = running.about(settings, weights, sources, **options, **sizes)
    on = sharding.use(mesh, settings.sharding.rules)
    return running.run(output, items, rows, batch_size * mesh.size, about, on)


def training_flags(settings: Config, output: str) -> list[str]:
    """The flags with which training reads visual words in the place of the codebook, and does not load it."""
    family = get_family(settings.family)
    paths, entries = expected_params(family, build(family.config_type, settings.model, "model")), []
    for entry in settings.init:
        gives = {path.startswith("codebook/") for path in paths if re.fullmatch(entry.include, path)}
        if entry.into != "params" or gives != {True}:
            include = f"(?!codebook/)(?:{entry.include})" if entry.into == "params" and True in gives else entry.include
            entries.append({"path": entry.path, "into": entry.into, "include": include})
    cleared = ("processor.augment", "processor.codebook_size", "model.codebook")
    measured = (name for name, spec in settings.eval.items() if spec["kind"] == "losses" and "codebook_cache" in spec)
    caches = ("data.codebook_cache", *(f"eval.{name}.codebook_cache" for name in measured))
    flags = {**dict.fromkeys(caches, output), **dict.fromkeys(cleared), "init": tuple(entries)}
    return [f"--config.{name}={value}" for name, value in flags.items()]


def _codebook(settings: Config, model: Any, mesh: Any) -> Any:
    """The weights of a model that is nothing but a codebook, from the entries of `config.init` that give them."""
    abstract = jax.eval_shape(lambda: {"params": model.init(jax.random.key(0))["params"]})
    entries = [
        dataclasses.replace(entry, include=f"(?=codebook/)(?:{entry.include})")  # the other weights have no place here
        for entry in settings.init
        if entry.into == "params" and any(re.fullmatch(entry.include, path) for path in flatten(abstract["params"]))
    ]
    return running.frozen_weights(settings, entries, mesh, "codebook", params=abstract["params"])["params"]


def pictures(
    sources: Sequence[Any], processor: Any, mine: running.Mine, part_size: int, threads: int
) -> Iterator[tuple[int, Key | None, Any]]:
    """Keys and codebook's pictures as items of `running`, decoded by threads ahead of their use.

    A part is `part_size` records, from one source to the next. A picture that the part has already is left out, and so
    is a damaged one.
    """
    ends = list(itertools.accumulate(len(source) for source in sources))
    total = ends[-1]

    def read(number: int, known: set[Key]) -> tuple[Key, Any] | None:
        place = bisect.bisect_right(ends, number)
        source, index = sources[place], number - (ends[place - 1] if place else 0)
        try:
            image = source[index].get("image")
            if image is None or (key := picture_key(image)) in known:
                return None
            return key, processor.codebook_image(image)
        except FatalDataError:
            raise
        except UserError as error:  # training replaces such an example too
            print(f"left out: {source.name}, record {index}: {error}", file=sys.stderr)
            return None

    def taken(part: int, known: set[Key], records: int, future: Future | None) -> tuple[int, Key | None, Any]:
        nonlocal done
        found = future.result() if future is not None else None
        progress.moved(done := done + records)
        if found is None or found[0] in known:
            return part, None, None
        known.add(found[0])
        return part, *found

    ahead: deque[tuple[int, set[Key], int, Future | None]] = deque()
    progress, done = Progress(total, enabled=jax.process_index() == 0, unit="picture"), 0
    with contextlib.closing(progress), ThreadPoolExecutor(max(1, threads), "pictures") as pool:
        try:
            for part in range(-(-total // part_size)):
                numbers, known = range(part * part_size, min(total, (part + 1) * part_size)), set()
                for number in numbers if mine(part) else ():
                    ahead.append((part, known, 1, pool.submit(read, number, known)))
                    if len(ahead) > _AHEAD * max(1, threads):
                        yield taken(*ahead.popleft())
                if not mine(part):
                    ahead.append((part, known, len(numbers), None))
            while ahead:
                yield taken(*ahead.popleft())
        finally:  # the consumer may have stopped: what has not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
