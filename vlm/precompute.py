"""Computes once what a frozen model says of the training data, so that training runs without it.

    python -m vlm.precompute --config=configs/altclip.py:altclip_teacher --output=data/teacher_cache

AltCLIP: the embeddings that stage 1's teacher has of all English sentences of the configured parallel text. Training
joins them to its examples by sentence (`config.data.teacher_cache`, the `_teacher_cached` variants): no teacher in
memory, and one row serves every language. The loss is the live teacher's, up to the rows' dtype.

    python -m vlm.precompute --config=configs/flava.py:full --config.processor.augment=None --output=data/visual_words

FLAVA: the visual words of all configured pictures, found by their bytes (`config.data.codebook_cache`). They are those
of whole pictures: training then crops nothing. `config.data.num_workers` threads read and decode pictures ahead of the
devices.

It runs on one host, with all its devices. A cache appears when it is complete: what is stopped before starts over, and
caches are not joined.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from vlm.config import build, command_line, parse_command
from vlm.errors import UserError, exit_on_user_error
from vlm.schema import Config

_AHEAD = 8
"""Records that are being read or wait to be taken, for each thread."""


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
            flags = " ".join(map(shlex.quote, training_flags(settings, output)))
            print(f"visual words of {count} pictures in {output}; train with {flags}")
        else:
            count = precompute(settings, output, options.dtype, options.batch_size)
            print(f"{count} sentences in {output}; train with --config.data.teacher_cache={output}")
    return 0


def precompute(settings: Config, output: str, dtype: str, batch_size: int) -> int:
    """Writes the cache; returns the number of distinct sentences.

    Raises:
      UserError: the configuration is not one of teacher learning with a live teacher, or has no parallel text.
    """
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
    with sharding.use(mesh, settings.sharding.rules):
        teacher = _teacher(settings, parts, mesh)
        embed = _on_all_devices(functools.partial(teacher_targets, loss), mesh)

        def rows(sentences: list[str]) -> Any:
            batch = processor.teacher_tokenizer(
                sentences, max_length=processor.teacher_max_length, padding="max_length"
            )
            return embed(teacher, {f"teacher_{name}": batch[name] for name in ("tokens", "mask")})

        def batches(known: Callable[[str], bool]) -> Iterator[tuple[list[str], Any]]:
            return _computed(_sentences(sources, known), rows, -(-batch_size // mesh.size) * mesh.size)

        return write_cache(output, batches, teacher=_fingerprint(loss, teacher), dtype=dtype)


def precompute_words(settings: Config, output: str, batch_size: int) -> int:
    """Writes the visual words of all pictures; returns their number.

    Raises:
      UserError: the model has no codebook or no checkpoint gives it, pictures are cropped at random, or there are none.
    """
    import numpy as np

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
    processor = make_processor(settings, family)
    side, expected = processor.config.codebook_size, config.codebook_size
    if side is None or expected not in (None, side):
        raise UserError(f"config.processor.codebook_size: expected {expected or 'the side of pictures'}, found {side}")
    specs = [spec for spec in settings.data.sources if "image" in spec.get("fields", ("image",))]
    if not specs:
        raise UserError("config.data.sources: expected pictures, found no source with an image field")
    sources, _ = open_sources(specs)
    alone = dict.fromkeys(("vision", "text", "fusion", "projection_dim", "classifier"), None)
    model = family.module(dataclasses.replace(config, **alone, heads=False))
    mesh = sharding.make_mesh(settings.sharding.mesh)
    with sharding.use(mesh, settings.sharding.rules):
        params = _codebook(settings, model, mesh)
        labels = _on_all_devices(functools.partial(model.apply, method=model.codebook_labels), mesh)

        def rows(pictures: list[Any]) -> Any:
            return labels({"params": params}, np.stack(pictures))

        def batches(known: Callable[[Any], bool]) -> Iterator[tuple[list[Any], Any]]:
            pictures = _pictures(sources, processor, known, settings.data.num_workers)
            return _computed(pictures, rows, -(-batch_size // mesh.size) * mesh.size)

        fingerprint = f"codebook:{_digest(config.codebook, params)}"
        options = {"dtype": "uint16", "vocab_size": config.image_vocab_size}
        return write_cache(output, batches, teacher=fingerprint, **options)


def training_flags(settings: Config, output: str) -> list[str]:
    """The flags with which training reads visual words in the place of the codebook, and does not load it."""
    from vlm.loading import expected_params
    from vlm.models import get_family

    family = get_family(settings.family)
    paths, entries = expected_params(family, build(family.config_type, settings.model, "model")), []
    for entry in settings.init:
        gives = {path.startswith("codebook/") for path in paths if re.fullmatch(entry.include, path)}
        if entry.into != "params" or gives != {True}:
            include = f"(?!codebook/)(?:{entry.include})" if entry.into == "params" and True in gives else entry.include
            entries.append({"path": entry.path, "into": entry.into, "include": include})
    cleared = ("processor.augment", "processor.codebook_size", "model.codebook")
    flags = {"data.codebook_cache": output, **dict.fromkeys(cleared), "init": tuple(entries)}
    return [f"--config.{name}={value}" for name, value in flags.items()]


def _on_all_devices(function: Callable[..., Any], mesh: Any) -> Callable[..., Any]:
    """`function` of weights and a batch, compiled, each device with its rows."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    split = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
    return jax.jit(function, in_shardings=(None, split))


def _computed(
    items: Iterable[tuple[Any, Any]], rows: Callable[[list[Any]], Any], batch_size: int
) -> Iterator[tuple[list[Any], Any]]:
    """Names of items and their rows, batch by batch; the devices have the next batch when one is handed out."""
    import numpy as np

    running: tuple[list[Any], Any] | None = None
    for chunk in itertools.chain(_chunks(items, batch_size), [{}]):
        names, content = list(chunk), list(chunk.values())
        padded = content + content[-1:] * (batch_size - len(content))  # one shape, one compilation
        following = (names, rows(padded)) if names else None
        if running is not None:
            yield running[0], np.asarray(running[1])[: len(running[0])]
        running = following


def _chunks(items: Iterable[tuple[Any, Any]], size: int) -> Iterator[dict[Any, Any]]:
    """So many items at a time by name, without those of the same chunk and of the one before, which still runs."""
    chunk: dict[Any, Any] = {}
    before: dict[Any, Any] = {}
    for name, item in items:
        if name not in before:
            chunk.setdefault(name, item)
        if len(chunk) == size:
            yield chunk
            before, chunk = chunk, {}
    if chunk:
        yield chunk


def _codebook(settings: Config, model: Any, mesh: Any) -> Any:
    """The weights of a model that is nothing but a codebook, from the entries of `config.init` that give them."""
    import jax

    from vlm.tree import flatten

    abstract = jax.eval_shape(lambda: {"params": model.init(jax.random.key(0))["params"]})
    entries = [
        dataclasses.replace(entry, include=f"(?=codebook/)(?:{entry.include})")  # the other weights have no place here
        for entry in settings.init
        if entry.into == "params" and any(re.fullmatch(entry.include, path) for path in flatten(abstract["params"]))
    ]
    return _weights(settings, entries, mesh, "codebook", params=abstract["params"])["params"]


def _weights(settings: Config, entries: Sequence[Any], mesh: Any, what: str, **abstract: Any) -> Any:
    """The arrays of `params` or `extra` on the mesh, from entries of `config.init`; all of them must be given."""
    from vlm import sharding
    from vlm.initial import starting_weights, still_random
    from vlm.training import put_weight
    from vlm.tree import flatten, unflatten

    placed = {name: sharding.place(tree, settings.sharding.rules, mesh.shape) for name, tree in abstract.items()}
    placements = SimpleNamespace(**({"params": {}, "extra": {}} | placed))
    start = starting_weights(entries, placements, mesh)
    if missing := still_random(start, placements):
        raise UserError(f"config.init: no checkpoint gives the {what}'s weights {missing}")
    targets = flatten(placed)
    return unflatten({path: put_weight(path, leaf, targets, mesh) for path, leaf in start.items()})


def _pictures(
    sources: Sequence[Any], processor: Any, known: Callable[[Any], bool], threads: int
) -> Iterator[tuple[Any, Any]]:
    """Keys and codebook's pictures of all sources, in order, decoded by threads ahead of their use.

    A picture that is known already is left out, and so is a damaged one.
    """
    from tqdm import tqdm

    from vlm.data.ledger import FatalDataError
    from vlm.data.teacher_cache import picture_key

    def read(source: Any, index: int) -> tuple[Any, Any] | None:
        try:
            image = source[index].get("image")
            if image is None or known(key := picture_key(image)):
                return None
            return key, processor.codebook_image(image)
        except FatalDataError:
            raise
        except UserError as error:  # training replaces such an example too
            print(f"left out: {source.name}, record {index}: {error}", file=sys.stderr)
            return None

    ahead: deque[Future] = deque()
    with ThreadPoolExecutor(max(1, threads), "pictures") as pool:
        try:
            for source in sources:
                bar = tqdm(range(len(source)), desc=source.name, unit="picture", disable=not sys.stderr.isatty())
                for index in bar:
                    ahead.append(pool.submit(read, source, index))
                    if len(ahead) > _AHEAD * max(1, threads) and (found := ahead.popleft().result()) is not None:
                        yield found
            while ahead:
                if (found := ahead.popleft().result()) is not None:
                    yield found
        finally:  # the consumer may have stopped: what has not begun is not waited for
            pool.shutdown(wait=False, cancel_futures=True)


def _teacher(settings: Config, parts: Any, mesh: Any) -> Any:
    """The extra state with the teacher's weights, from the entries of `config.init` that go there."""
    entries = [entry for entry in settings.init if entry.into.split("/")[0] == "extra"]
    return _weights(settings, entries, mesh, "teacher", extra=parts.init.abstract().extra)["extra"]


def _sentences(sources: Sequence[Any], known: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """English sentences of all sources that are not known yet, in order; each names itself."""
    from tqdm import tqdm

    for source in sources:
        for index in tqdm(range(len(source)), desc=source.name, unit="pair", disable=not sys.stderr.isatty()):
            text = source[index].get("source_text")
            if not isinstance(text, str):
                raise UserError(f"{source.name}, record {index}: expected a `source_text` string, found {text!r:.80}")
            if not known(text):
                yield text, text


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
