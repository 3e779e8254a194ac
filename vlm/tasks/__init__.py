"""Runs all tasks on which a paper reports numbers, and prints its table with ours beside it.

    python -m vlm.tasks --config=configs/flava_tasks.py --checkpoint=CHECKPOINT --output=results/flava
    python -m vlm.tasks --config=configs/flava_tasks.py --checkpoint=CHECKPOINT --output=results/flava --only=cola,rte

A task evaluates the checkpoint as it is (zero-shot, linear probes), or fine-tunes it first as train.py does and then
evaluates the result. Tasks whose data is absent are listed with the paths that they expect; --data=DIR is where they
are looked for. Run the same command again: finished tasks are read back, an unfinished one goes on, and tasks whose
data has come are run; another checkpoint, also one at the same path, is refused. Everything is in the folder --output:
results.json, and of each task TASK/result.json with a line per example and a page, and TASK/run, the fine-tuned model.
The last line on standard output is one JSON object.

On several hosts (--distributed, or --coordinator and its companions) each is given the same command; they share the
folders of data and output.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import Parser, UserError, did_you_mean, exit_on_user_error
from vlm.hosts import add_host_flags, connect, may_end_alone


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m vlm.tasks", description=__doc__)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="the tasks, such as configs/flava_tasks.py"
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="what is evaluated and fine-tuned")
    parser.add_argument("--output", required=True, metavar="DIR", help="new, or of an earlier run of this command")
    parser.add_argument("--data", default="data", metavar="DIR", help="what the paths' beginning data/ means")
    parser.add_argument("--only", metavar="TASKS", help="names of tasks, separated by commas")
    parser.add_argument("--compare", metavar="MODEL", help="whose published numbers are shown; default: the config's")
    parser.add_argument("--limit", metavar="N", type=int, help="evaluate the first N examples of every data set only")
    parser.add_argument("--dry_run", action="store_true", help="only list the tasks and what data is absent")
    add_host_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 75 when it was stopped in a training and saved."""
    from vlm.checkpoint.processes import is_primary
    from vlm.config import load
    from vlm.preemption import EXIT_PREEMPTED
    from vlm.tasks import running, table
    from vlm.tasks.settings import read

    with may_end_alone(), exit_on_user_error():
        options = arguments().parse_args(argv)
        if not Path(options.checkpoint).exists():
            raise UserError(f"--checkpoint: no such file or folder: {options.checkpoint}")
        config_file = Path(options.config.partition(":")[0])
        settings = read(load(options.config), options.data, options.compare)
        chosen = options.only.split(",") if options.only else list(settings.tasks)
        for name in chosen:
            if name not in settings.tasks:
                raise UserError(f"--only: no task {name!r}{did_you_mean(name, settings.tasks)}")
        if options.limit is not None and options.limit < 1:
            raise UserError(f"--limit: expected at least 1, found {options.limit}")
        if os.path.lexists(options.output) and not os.path.isdir(options.output):
            raise UserError(f"--output: {options.output} is no folder")
        if options.dry_run:
            _show(settings, {}, running.absent_data(settings, chosen, options.data), options)
            return 0
        connect(options)
        folders = Path(options.checkpoint), Path(options.output), config_file.parent
        context = running.Context.of(*folders, options.data, options.limit)
        metrics, stopped = running.run(settings, chosen, context)
        absent = running.absent_data(settings, chosen, options.data)
        running.write(context, table.report(settings, metrics, absent, options.compare or settings.compare))
        if is_primary():
            _show(settings, metrics, absent, options)
    return EXIT_PREEMPTED if stopped else 0


def _show(settings: Any, metrics: Any, absent: Any, options: argparse.Namespace) -> None:
    from vlm.tasks import table

    report = table.report(settings, metrics, absent, options.compare or settings.compare)
    print(table.shown(report))
    print(json.dumps(table.summary(report)))
