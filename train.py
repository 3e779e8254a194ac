"""Pretrains any model family: configuration, model, data, state, step, loop.

    python train.py --config=configs/altclip.py:tiny --workdir=runs/tiny
    python train.py --config=configs/altclip.py:altclip --dry_run

Run the same command again to go on from the newest verified checkpoint, on any number of devices and hosts. SIGTERM
and SIGINT finish the step, save, and exit with status 75.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.config import build, command_line, config_hash, parse_command
from vlm.errors import UserError, exit_on_user_error
from vlm.heap import keep_freed_memory
from vlm.hosts import add_host_flags, connect, may_end_alone
from vlm.metrics import Diverged
from vlm.schema import Config


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__ or "")
    parser.add_argument("--workdir", metavar="DIR", help="where checkpoints, metrics and samples go")
    parser.add_argument("--dry_run", action="store_true", help="describe the run without allocating a weight")
    parser.add_argument("--allow_config_change", action="store_true", help="go on with another configuration or data")
    add_host_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with may_end_alone(), exit_on_user_error():
        options, config = parse_command(arguments(), argv)
        if config is None:
            raise UserError("--config=FILE is missing; see --help")
        settings = build(Config, config, "")
        if options.dry_run:
            from vlm import dry_run

            print(dry_run.describe(settings, config))
            return 0
        if not options.workdir:
            raise UserError("--workdir=DIR is missing; see --help")
        keep_freed_memory()
        connect(options)
        try:
            return train(config, settings, Path(options.workdir), options.allow_config_change)
        except Diverged as error:
            sys.exit(f"error: {error}")  # the input is not wrong: status 1


def train(config: Any, settings: Config, workdir: Path, allow_change: bool = False) -> int:
    """The whole run. Returns the exit status: 0 when all steps are done, 75 when it was stopped and saved."""
    import jax
    from jax.sharding import NamedSharding

    from vlm import evaluation, sharding
    from vlm import workdir as folder
    from vlm.checkpoint import Checkpoints
    from vlm.checkpoint.processes import from_primary
    from vlm.checks import check_data
    from vlm.experiment import Steps, device_batches, experiment, make_loader, make_processor, make_report
    from vlm.initial import begin
    from vlm.preemption import EXIT_PREEMPTED, Preemption, Stopped
    from vlm.tree import listing

    mesh = sharding.make_mesh(settings.sharding.mesh)
    with contextlib.ExitStack() as stack:
        from_primary(lambda: stack.enter_context(folder.claim(workdir)))
        from_primary(lambda: folder.check_config(workdir, config, allow_change))
        stack.enter_context(sharding.use(mesh, settings.sharding.rules))
        preemption = stack.enter_context(Preemption(mesh if jax.process_count() > 1 else None))

        # Model and data; nothing is allocated yet.
        parts = experiment(settings)
        placements = sharding.place(parts.init.abstract(), settings.sharding.rules, mesh.shape)
        if jax.process_index() == 0 and (whole := sharding.replicated((placements.params, placements.extra))):
            print(f"replicated although a rule would split them: {listing(whole, 4)}", file=sys.stderr)
        rows = (settings.data.batch_size, mesh.shape, settings.optimizer.accumulation_steps, settings.train.pack_texts)
        split = NamedSharding(mesh, sharding.batch_spec(settings.sharding, *rows))
        processor = make_processor(settings, parts.family)
        loader = make_loader(settings, processor, split, workdir)
        from_primary(lambda: check_data(parts, placements, loader))
        evaluations, axes = evaluation.prepare(settings.eval), sharding.batch_axes(settings.sharding.rules)
        asked = {"model": parts.model, "params": placements.params, "processor": processor}
        from_primary(lambda: evaluation.check(evaluations, **asked, mesh=mesh, batch_axes=axes))

        # The state: from the newest verified checkpoint, or new.
        kept = {name: getattr(settings.train, name) for name in ("keep", "keep_every", "verify")}
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", **kept))
        state = begin(settings, parts, placements, mesh, checkpoints, loader.fingerprint, allow_change, processor)

        # What happens between steps.
        start, several = int(state.step), jax.process_count() > 1
        report = stack.enter_context(make_report(settings, config, workdir, start, loader.steps_of_streams))
        from_primary(lambda: folder.record(workdir, config, processor))
        results = lambda number: workdir / "eval" / f"step_{number:08d}.json"  # noqa: E731
        samples = folder.Samples(workdir, settings.train.sample_images)

        def show(number: int, batch: Any) -> None:
            from_primary(lambda: samples.keep(number, batch))

        def save(number: int, state: Any, wait: bool = False) -> None:
            position = {"step": number, "fingerprint": loader.fingerprint}
            checkpoints.save(number, state, position, config_hash(config), wait=wait)

        def evaluate(number: int, state: Any) -> None:
            about = {"step": number, "config": config_hash(config)}
            settled = {"mesh": mesh, "batch_axes": axes, "progress": False}
            settled |= {"output": results(number), "about": about, "poll": preemption.poll}
            with report.paused(), contextlib.nullcontext() if several else preemption.interrupting():
                values = evaluation.run(evaluations, parts.model, state.params, processor, **settled)
            report.evaluated(number, values)

        # The loop, after an evaluation that a stop or a failure has left out.
        try:
            missing = bool(settings.eval) and due(settings.train.eval_every, start, settings)
            if missing and from_primary(lambda: not results(start).exists()):
                evaluate(start, state)
            if start >= settings.train.steps:
                report.say(f"all {start} steps are done")
                return 0
            batches = stack.enter_context(loader.iterate(start))
            feed = device_batches(settings, batches, split, preemption, settings.train.steps - start)
            loop(settings, state, Steps(settings, parts, split), feed, report, show, save, evaluate)
        except Stopped:
            report.say(
                f"stopped and saved at step {max(checkpoints.steps(), default=0)}; the same command goes on from there"
            )
            return EXIT_PREEMPTED
        return 0


def due(every: int, number: int, settings: Config) -> bool:
    """Whether something is to happen after step `number`: every so many steps (0: never), and after the last one."""
    return bool(every and number) and (number % every == 0 or number == settings.train.steps)


def loop(
    settings: Config,
    state: Any,
    steps: Any,
    feed: Iterator[tuple[Any, float, float]],
    report: Any,
    show: Any,
    save: Any,
    evaluate: Any,
) -> None:
    """Runs the steps that are left, with everything that happens between them.

    Raises:
      Stopped: a signal came; all is saved.
    """
    from vlm.preemption import Stopped

    number, last, train = int(state.step), settings.train.steps, settings.train
    item = next(feed, None)
    while item is not None:
        batch, tokens, waited = item
        if batch not in steps:  # the first of a stream, or of a length of text
            with report.paused():
                flops = steps(state, batch)[1]
                show(number, batch)
                shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in sorted(batch.items()))
                report.say(f"batches of {shapes}: {flops.whole / 1e9:.4g} GFLOP per step")
        number += 1
        step, flops = steps(state, batch)
        state, metrics = step(state, batch)
        report.dispatched(number, metrics, tokens, waited, flops)
        item = next(feed, None)  # while the step runs; None: this was the last, or a stop was asked for
        stopping = item is None and number < last
        evaluating = bool(settings.eval) and due(train.eval_every, number, settings) and not stopping
        if stopping or evaluating or number == last or due(train.checkpoint_every, number, settings):
            with report.paused():  # durable before an evaluation starts, which may be killed or fail
                save(number, state, wait=stopping or evaluating or number == last)
        if evaluating:
            evaluate(number, state)
    if number < last:
        raise Stopped


if __name__ == "__main__":
    sys.exit(main())
