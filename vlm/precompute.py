"""Computes the embeddings of stage 1's teacher once, for all English sentences of the configured parallel text.

    python -m vlm.precompute --config=configs/altclip.py:altclip_teacher --output=data/teacher_cache

Training then joins them to its examples by sentence (`config.data.teacher_cache`, the `_teacher_cached` variants): no
teacher in memory, and one row serves every language. The loss is the live teacher's, up to the rows' dtype.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import os
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
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the rows")
    parser.add_argument("--batch_size", type=int, default=1024, help="sentences at a time, over all devices")
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
        count = precompute(build(Config, config, ""), options.output, options.dtype, options.batch_size)
        print(f"{count} sentences in {options.output}; train with --config.data.teacher_cache={options.output}")
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
    import numpy as np

    from vlm.tree import flatten

    digest = hashlib.sha256(repr(loss.teacher).encode())
    for path, leaf in sorted(flatten(teacher).items()):
        digest.update(path.encode())
        digest.update(np.asarray(leaf).tobytes())
    return f"{loss.target}:{digest.hexdigest()}"


if __name__ == "__main__":
    sys.exit(main())
