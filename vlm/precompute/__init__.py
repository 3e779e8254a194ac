"""Computes once what a frozen model says of the training data, so that training runs without it.

    python -m vlm.precompute --config=configs/altclip.py:altclip_teacher --output=data/teacher_cache

AltCLIP: the embeddings that stage 1's teacher has of all English sentences of the configured parallel text. Training
joins them to its examples by sentence (`config.data.teacher_cache`, the `_teacher_cached` variants): no teacher in
memory, and one row serves every language. The loss is the live teacher's, up to the rows' dtype.

    python -m vlm.precompute --config=configs/flava.py:full --config.processor.augment=None --output=data/visual_words

FLAVA: the visual words of all configured pictures, found by their bytes (`config.data.codebook_cache`). They are those
of whole pictures: training then crops nothing. `config.data.num_workers` threads read and decode pictures ahead of the
devices.

Several hosts (--distributed, or --coordinator and its companions) share the work and the folder. Each takes every so
many'th part of --part_size records and computes it on its own devices. Until all are there they lie in OUTPUT.parts;
then they are joined, and OUTPUT appears. Run the same command again and it goes on after the finished parts, on any
number of hosts. The result is the same to the byte on any number of hosts and devices of one kind, stopped or not.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from vlm.config import build, command_line, parse_command
from vlm.errors import UserError, exit_on_user_error
from vlm.hosts import add_host_flags, connect, may_end_alone
from vlm.schema import Config


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__ or "")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to make; its parts lie in DIR.parts")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of embeddings")
    parser.add_argument("--batch_size", type=int, default=128, help="sentences or pictures at a time on each device")
    parser.add_argument("--part_size", type=int, default=1 << 14, help="records that are computed and kept together")
    add_host_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with may_end_alone(), exit_on_user_error():
        options, config = parse_command(arguments(), argv)
        if config is None:
            raise UserError("--config=FILE is missing; see --help")
        for name in ("batch_size", "part_size"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name}: expected at least 1, found {getattr(options, name)}")
        if os.path.lexists(options.output):
            left = (
                f" (and {parts} is left over: remove it)" if os.path.exists(parts := f"{options.output}.parts") else ""
            )
            raise UserError(f"--output: {options.output} exists already{left}")
        settings, output = build(Config, config, ""), options.output
        connect(options)
        sizes = {"batch_size": options.batch_size, "part_size": options.part_size}
        if settings.family == "flava":
            from vlm.precompute.words import precompute_words, training_flags

            count = precompute_words(settings, output, **sizes)
            flags, said = training_flags(settings, output), f"visual words of {count} pictures in {output}"
        else:
            from vlm.precompute.sentences import precompute, training_flags

            count = precompute(settings, output, options.dtype, **sizes)
            flags, said = training_flags(settings, output), f"{count} sentences in {output}"
        import jax

        if jax.process_index() == 0:
            print(f"{said}; train with {' '.join(map(shlex.quote, flags))}")
    return 0
