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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm.config import build, command_line, config_hash, parse_command
from vlm.errors import UserError, exit_on_user_error
from vlm.heap import keep_freed_memory
from vlm.hosts import add_host_flags, connect
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
    with exit_on_user_error():
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
    from vlm.experiment import Steps, experiment, make_loader, make_processor, make_report
    from vlm.preemption import Preemption
    from vlm.tree import listing

    primary, micro = jax.process_index() == 0, settings.optimizer.accumulation_steps
    mesh = sharding.make_mesh(settings.sharding.mesh)
    with contextlib.ExitStack() as stack:
        from_primary(lambda: stack.enter_context(folder.claim(workdir)))
        from_primary(lambda: folder.check_config(workdir, config, allow_change))
        stack.enter_context(sharding.use(mesh, settings.sharding.rules))
        preemption = stack.enter_context(Preemption(mesh if jax.process_count() > 1 else None))

        # Model and data; nothing is allocated yet.
        parts = experiment(settings)
        placements = sharding.place(parts.init.abstract(), settings.sharding.rules, mesh.shape)
        if primary and (whole := sharding.replicated((placements.params, placements.extra))):
            reasons = listing([f"{p.path.split('/', 1)[1]}: {p.replicated}" for p in whole], 4)
            print(f"replicated although a rule would split them: {reasons}", file=sys.stderr)
        split = NamedSharding(mesh, sharding.batch_spec(settings.sharding, settings.data.batch_size, mesh.shape, micro))
        processor = make_processor(settings, parts.family)
        loader = make_loader(settings, processor, split, workdir)
        from_primary(lambda: check_data(parts, placements, loader))
        evaluations = evaluation.prepare(settings.eval)

        # The state: from the newest verified checkpoint, or new.
        kept = {name: getattr(settings.train, name) for name in ("keep", "keep_every", "verify")}
        checkpoints = Checkpoints(workdir / "checkpoints", **kept)
        stack.enter_context(contextlib.closing(checkpoints))
        state = begin(settings, parts, placements, mesh, checkpoints, loader.fingerprint, allow_change)
        from_primary(lambda: folder.record(workdir, config, processor))

        # The step, compiled for the first batch of every structure; then the loop.
        start = int(state.step)
        batches = stack.enter_context(loader.iterate(start))
        feed = device_batches(batches, split, settings.data.batch_size, settings.train.text_lengths)
        if start >= settings.train.steps:
            return 0
        steps = Steps(settings, parts, split)

        shown: set[frozenset[str]] = set()

        def prepare(number: int, state: Any, batch: Any) -> Any:
            """Compiles the step for such batches, and keeps pictures of the first with these arrays; its FLOPs."""
            if "image" in batch and frozenset(batch) not in shown:
                images = batch["image"].addressable_data(0)  # of this host
                from_primary(lambda: str(folder.save_samples(workdir, images, number, settings.train.sample_images)))
            shown.add(frozenset(batch))
            return steps(state, batch)[1]

        first = next(feed)
        flops = prepare(start, state, first[0])
        report = stack.enter_context(make_report(settings, config, workdir, flops, start, loader.steps_of_streams))

        def save(number: int, state: Any, wait: bool = False) -> None:
            position = {"step": number, "fingerprint": loader.fingerprint}
            checkpoints.save(number, state, position, config_hash(config), wait=wait)

        def evaluate(number: int, state: Any) -> dict[str, float]:
            output, about = (
                workdir / "eval" / f"step_{number:08d}.json",
                {"step": number, "config": config_hash(config)},
            )
            settled = {"mesh": mesh, "output": output, "about": about, "progress": False}
            axes = sharding.batch_axes(settings.sharding.rules)
            return evaluation.run(evaluations, parts.model, state.params, processor, batch_axes=axes, **settled)

        return loop(settings, state, steps, prepare, first, feed, report, save, evaluate, preemption)


def begin(
    settings: Config, parts: Any, placements: Any, mesh: Any, checkpoints: Any, fingerprint: str, allow_change: bool
) -> Any:
    """The state to go on with."""
    import jax

    from vlm.initial import starting_weights, still_random, towers_of_run
    from vlm.sharding import abstract
    from vlm.training import init_state

    found = checkpoints.restore(abstract(placements, mesh))
    if found is None:
        run = towers_of_run(parts.model_config, parts.loss_config)
        start = starting_weights(settings.init, placements, mesh, run)
        if jax.process_index() == 0 and start and (random := still_random(start, placements)):
            print(f"not in the starting weights, so as of a new run: {random}", file=sys.stderr)
        return init_state(parts.init, placements, mesh, settings.train.seed, start)
    state, step, position = found
    if position.get("fingerprint") != fingerprint and not allow_change:
        raise UserError(f"the data differ from those up to step {step} (--allow_config_change to go on with them)")
    if jax.process_index() == 0:
        print(f"resumed from step {step}", file=sys.stderr)
    return state


def device_batches(
    batches: Iterator[Any], split: Any, batch_size: int, text_lengths: Sequence[int]
) -> Iterator[tuple[Any, float, float]]:
    """(batch on the devices, its real tokens, seconds waited for it); copies run beside the step before."""
    import jax

    from vlm.sharding import put_batch
    from vlm.training import shortest_text

    while True:
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        tokens = float(batch["mask"].sum()) * batch_size / len(batch["mask"]) if "mask" in batch else 0.0
        if jax.process_count() == 1:  # several hosts choose a length in the step
            batch = shortest_text(batch, text_lengths)
        yield put_batch(batch, split, batch_size), tokens, waited


def loop(
    settings: Config,
    state: Any,
    steps: Any,
    prepare: Any,
    item: tuple[Any, float, float],
    feed: Iterator[tuple[Any, float, float]],
    report: Any,
    save: Any,
    evaluate: Any,
    preemption: Any,
) -> int:
    """Runs the steps that are left, with everything that happens between them."""
    from vlm.preemption import EXIT_PREEMPTED

    first, last = int(state.step) + 1, settings.train.steps
    due = lambda number, every: bool(every) and (number % every == 0 or number == last)  # noqa: E731
    for number in range(first, last + 1):
        batch, tokens, waited = item
        if batch not in steps:  # the first of another stream, or of another length of text
            with report.paused():
                flops = prepare(number - 1, state, batch)
                shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in sorted(batch.items()))
                report.say(f"batches of {shapes}: {flops.whole / 1e9:.4g} GFLOP per step")
        step, flops = steps(state, batch)
        state, metrics = step(state, batch)
        report.dispatched(number, metrics, tokens, waited, flops)
        stopping = preemption.stop()
        if number < last and not stopping:
            item = next(feed)  # while the step runs
        evaluating = bool(settings.eval) and due(number, settings.train.eval_every) and not stopping
        if stopping or number == last or due(number, settings.train.checkpoint_every):
            with report.paused():  # durable before an evaluation starts, which may be killed or fail
                save(number, state, wait=stopping or number == last or evaluating)
        if evaluating:
            with report.paused():
                report.evaluated(number, evaluate(number, state))
        if stopping and number < last:
            report.say(f"stopped and saved at step {number}; the same command goes on from there")
            return EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
