"""Computes once what a frozen model says of the training data, so that training runs without it.

    python -m vlm.precompute --config=configs/altclip.py:altclip_teacher --output=data/teacher_cache

AltCLIP: the embeddings that stage 1's teacher has of all English sentences of the configured parallel text. Training
joins them to its examples by sentence (`config.data.teacher_cache`, the `_teacher_cached` variants): no teacher in
memory, and one row serves every language. The loss is the live teacher's, up to the rows' dtype.

    python -m vlm.precompute --config=configs/flava.py:full --config.processor.augment=None --output=data/visual_words

FLAVA: the visual words of all configured pictures, found by their bytes (`config.data.codebook_cache`). They are those
of whole pictures: training then crops nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from vlm.config import build, command_line, parse_command
from vlm.errors import UserError, exit_on_user_error
from vlm.schema import Config


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__ or "")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of embeddings")
    parser.add_argument(
        "--batch_size", type=int, default=1024, help="sentences or pictures at a time, over all devices"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with exit_on_user_error():
        options, config = parse_command(arguments(), argv)
        if config is None:
            raise UserError("--config=FILE is missing; see --help")
        if options.batch_size < 1:
            raise UserError(f"--batch_size: expected at least 1, found {options.batch_size}")
        if os.path.lexists(options.output):
            raise UserError(f"--output: {options.output} exists already")
        settings, output = build(Config, config, ""), options.output
        if settings.family == "flava":
            count = precompute_words(settings, output, options.batch_size)
            found, others = f"visual words of {count} pictures", " --config.processor.codebook_size=None"
            print(f"{found} in {output}; train with --config.data.codebook_cache={output}{others}")
        else:
            count = precompute(settings, output, options.dtype, options.batch_size)
            print(f"{count} sentences in {output}; train with --config.data.teacher_cache={output}")
    return 0


def precompute(settings: Config, output: str, dtype: str, batch_size: int) -> int:
    """Writes the cache; returns the number of distinct sentences.

    Raises:
      UserError: the configuration is not one of teacher learning with a live teacher, or has no parallel text.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from vlm import sharding
    from vlm.data.source import open_sources
    from vlm.data.teacher_cache import write_cache
    from vlm.experiment import experiment, make_processor
    from vlm.models.altclip.loss import LossConfig, teacher_targets

    parts = experiment(settings)
    loss = parts.loss_config
    if not isinstance(loss, LossConfig) or loss.objective != "teacher_learning" or loss.teacher is None:
        raise UserError("config.loss: expected objective 'teacher_learning' with a live teacher (loss.teacher)")
    processor = make_processor(settings, parts.family)
    if processor.teacher_tokenizer is None:
        raise UserError("config.processor.teacher_tokenizer is missing")
    sources, _ = open_sources(settings.data.sources)
    mesh = sharding.make_mesh(settings.sharding.mesh)
    devices = mesh.size
    batch_size = -(-batch_size // devices) * devices
    with sharding.use(mesh, settings.sharding.rules):
        teacher = _teacher(settings, parts, mesh)
        split = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
        embed = jax.jit(functools.partial(teacher_targets, loss), in_shardings=(None, split))
        batches = _embeddings(sources, processor, embed, teacher, batch_size)
        return write_cache(output, batches, teacher=_fingerprint(loss, teacher), dtype=dtype)


def precompute_words(settings: Config, output: str, batch_size: int) -> int:
    """Writes the visual words of all pictures; returns their number.

    Raises:
      UserError: the model has no codebook or no checkpoint gives it, pictures are cropped at random, or there are none.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from vlm import sharding
    from vlm.data.source import open_sources
    from vlm.data.teacher_cache import write_cache
    from vlm.experiment import make_processor
    from vlm.models import get_family

    family = get_family(settings.family)
    config = build(family.config_type, settings.model, "model")
    if config.codebook is None:
        raise UserError("config.model.codebook: expected the codebook, found None")
    if settings.processor.get("augment") is not None:
        raise UserError("config.processor.augment: expected None, found random crops, whose words would be others")
    alone = dict.fromkeys(("vision", "text", "fusion", "projection_dim", "classifier"), None)
    model = family.module(dataclasses.replace(config, **alone, heads=False))
    processor = make_processor(settings, family)
    sources, _ = open_sources(settings.data.sources)
    mesh = sharding.make_mesh(settings.sharding.mesh)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with sharding.use(mesh, settings.sharding.rules):
        params = _codebook(settings, model, mesh)
        split = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
        words = functools.partial(model.apply, method=model.codebook_labels)
        labels = jax.jit(words, in_shardings=(None, split))
        batches = _words(sources, processor, lambda image: labels({"params": params}, image), batch_size)
        fingerprint = f"codebook:{_digest(config.codebook, params)}"
        return write_cache(output, batches, teacher=fingerprint, dtype="uint16", vocab_size=config.image_vocab_size)


def _codebook(settings: Config, model: Any, mesh: Any) -> Any:
    """The weights of a model that is nothing but a codebook, from the entries of `config.init` that give them."""
    import jax

    from vlm import sharding
    from vlm.initial import starting_weights, still_random
    from vlm.training import put_weight
    from vlm.tree import flatten, unflatten

    abstract = jax.eval_shape(lambda: {"params": model.init(jax.random.key(0))["params"]})
    params = sharding.place(abstract, settings.sharding.rules, mesh.shape)["params"]
    placements = SimpleNamespace(params=params, extra={})
    entries = [
        dataclasses.replace(entry, include=f"(?=codebook/)(?:{entry.include})")  # the other weights have no place here
        for entry in settings.init
        if entry.into == "params" and any(re.fullmatch(entry.include, path) for path in flatten(params))
    ]
    start = starting_weights(entries, placements, mesh)
    if missing := still_random(start, placements):
        raise UserError(f"config.init: no checkpoint gives the codebook's weights {missing}")
    targets = flatten({"params": params})
    return unflatten({path: put_weight(path, leaf, targets, mesh) for path, leaf in start.items()})["params"]


def _words(sources: Sequence[Any], processor: Any, labels: Any, batch_size: int) -> Iterator[tuple[list[bytes], Any]]:
    """Distinct pictures of all sources, in order, and their visual words; a picture that is damaged is left out."""
    import numpy as np
    from tqdm import tqdm

    from vlm.data.teacher_cache import image_key

    def pictures() -> Iterator[tuple[bytes, Any]]:
        seen: set[bytes] = set()
        for source in sources:
            for index in tqdm(range(len(source)), desc=source.name, unit="picture", disable=not sys.stderr.isatty()):
                try:
                    image = source[index].get("image")
                    if image is not None and (key := image_key(image)) not in seen:
                        seen.add(key)
                        yield image, processor.codebook_image(image)
                except UserError as error:  # training replaces such an example too
                    print(f"left out: {source.name}, record {index}: {error}", file=sys.stderr)

    stream = pictures()
    while chunk := list(itertools.islice(stream, batch_size)):
        pixels = [pixels for _, pixels in chunk]
        batch = np.stack(pixels + pixels[-1:] * (batch_size - len(chunk)))  # one shape, one compilation
        yield [image for image, _ in chunk], np.asarray(labels(batch))[: len(chunk)]


def _teacher(settings: Config, parts: Any, mesh: Any) -> Any:
    """The extra state with the teacher's weights, from the entries of `config.init` that go there."""
    from vlm import sharding
    from vlm.initial import starting_weights, still_random
    from vlm.training import put_weight
    from vlm.tree import flatten, unflatten

    abstract = parts.init.abstract().extra
    placements = SimpleNamespace(params={}, extra=sharding.place(abstract, settings.sharding.rules, mesh.shape))
    entries = [entry for entry in settings.init if entry.into.split("/")[0] == "extra"]
    start = starting_weights(entries, placements, mesh)
    if missing := still_random(start, placements):
        raise UserError(f"config.init: no checkpoint gives the teacher's weights {missing}")
    targets = flatten({"extra": placements.extra})
    arrays = {path: put_weight(path, leaf, targets, mesh) for path, leaf in start.items()}
    return unflatten(arrays)["extra"]


def _embeddings(
    sources: Sequence[Any], processor: Any, embed: Any, teacher: Any, batch_size: int
) -> Iterator[tuple[list[str], Any]]:
    """Distinct English sentences of all sources, in order, and their embeddings."""
    import numpy as np
    from tqdm import tqdm

    from vlm.data.teacher_cache import sentence_key

    def sentences() -> Iterator[str]:
        seen: set[bytes] = set()
        for source in sources:
            for index in tqdm(range(len(source)), desc=source.name, unit="pair", disable=not sys.stderr.isatty()):
                text = source[index].get("source_text")
                if not isinstance(text, str):
                    raise UserError(
                        f"{source.name}, record {index}: expected a `source_text` string, found {text!r:.80}"
                    )
                key = sentence_key(text)
                if key not in seen:
                    seen.add(key)
                    yield text

    stream = sentences()
    while chunk := list(itertools.islice(stream, batch_size)):
        padded = chunk + [chunk[-1]] * (batch_size - len(chunk))  # one shape, one compilation
        rows = processor.teacher_tokenizer(padded, max_length=processor.teacher_max_length, padding="max_length")
        batch = {f"teacher_{name}": rows[name] for name in ("tokens", "mask")}
        yield chunk, np.asarray(embed(teacher, batch))[: len(chunk)]


def _fingerprint(loss: Any, teacher: Any) -> str:
    """The target that is taken from the teacher, and the SHA-256 of its weights."""
    return f"{loss.target}:{_digest(loss.teacher, teacher)}"


def _digest(architecture: Any, weights: Any) -> str:
    import numpy as np

    from vlm.tree import flatten

    digest = hashlib.sha256(repr(architecture).encode())
    for path, leaf in sorted(flatten(weights).items()):
        digest.update(path.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
