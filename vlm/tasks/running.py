"""Runs tasks one after the other: training by train.py's function; finished ones are read."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vlm
from vlm import evaluation, sharding
from vlm.checkpoint.processes import from_primary
from vlm.config import build
from vlm.data.annotations import frequent_answers
from vlm.errors import UserError
from vlm.loading import OpenModel, open_model
from vlm.manifest import write_atomically
from vlm.schema import Config, ShardingConfig
from vlm.strict import plain
from vlm.tasks.fitting import fitted
from vlm.tasks.settings import Task, Tasks
from vlm.tokenizers.files import read_json
from vlm.workdir import environment

ROOT = Path(vlm.__file__).resolve().parents[1]
RESULT, FINISHED = "result.json", "finished.json"


@dataclasses.dataclass(frozen=True)
class Context:
    """What all tasks share: the checkpoint, the output folder, the configurations' folder, `--data` and `--limit`."""

    checkpoint: Path
    output: Path
    configs: Path
    data: str
    limit: int | None


def run(settings: Tasks, chosen: Sequence[str], context: Context) -> tuple[dict[str, dict[str, float]], bool]:
    """Runs the chosen tasks whose data is there; results of others that finished before are read.

    Returns:
      {task: {"evaluation/metric": value}} of the tasks that have results, and whether a signal ended a training, which
      was saved.

    Raises:
      UserError: a checkpoint that cannot be opened, or a task that cannot be run: those before it are kept.
    """
    metrics: dict[str, dict[str, float]] = {}
    opened = open_model(context.checkpoint, verify="fast")
    from_primary(lambda: context.output.mkdir(parents=True, exist_ok=True))
    for name, task in settings.tasks.items():
        found = _finished(context, name, task)
        if found is not None:
            metrics[name] = found
    left = [name for name in settings.tasks if name in chosen and name not in metrics]
    left = [name for name in left if not settings.tasks[name].absent(context.data)]
    left.sort(key=lambda name: settings.tasks[name].train is not None)  # those of the checkpoint itself share it
    loaded: list[Any] = []
    for name in left:
        task = settings.tasks[name]
        _say(f"{name}: {task.name}")
        try:
            if task.train is not None:
                loaded.clear()  # its memory is needed
                if not _train(context, name, task, opened):
                    return metrics, True
                metrics[name] = _evaluate(context, name, task, context.output / name / "run", [])
            else:
                metrics[name] = _evaluate(context, name, task, context.checkpoint, loaded)
        except UserError as error:
            raise UserError(f"task {name}: {error}") from error
    return metrics, False


def write(context: Context, report: dict[str, Any]) -> None:
    """Writes results.json."""
    content = {"format_version": 1, "checkpoint": str(context.checkpoint.resolve()), "limit": context.limit, **report}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    from_primary(lambda: write_atomically(context.output / "results.json", text.encode()))


def _train(context: Context, name: str, task: Task, opened: OpenModel) -> bool:
    """Fine-tunes the checkpoint in the task's folder; False when that was stopped."""
    folder, answers = context.output / name, None
    if task.answers is not None:
        answers = folder / "answers.json"
        from_primary(functools.partial(write_answers, answers, task.answers))
    config = fitted(task, opened, context.checkpoint, context.configs, context.data, answers)
    return _train_function()(config, build(Config, config, ""), folder / "run") == 0


def _evaluate(context: Context, name: str, task: Task, checkpoint: Path, loaded: list[Any]) -> dict[str, float]:
    """Evaluates a checkpoint, which `loaded` keeps for the next task, and notes that the task is finished."""
    folder, spread = context.output / name, ShardingConfig()
    mesh = sharding.make_mesh(spread.mesh)
    plan = evaluation.prepare(task.eval, limit=context.limit)
    with sharding.use(mesh, spread.rules):
        if not loaded:
            loaded += vlm.load(checkpoint, mesh=mesh, rules=spread.rules)
        about = {"task": name, "checkpoint": str(checkpoint.resolve()), "limit": context.limit}
        about |= {"code": f"vlm {vlm.__version__}", "environment": environment()}
        axes = sharding.batch_axes(spread.rules)
        settled = {"mesh": mesh, "batch_axes": axes, "output": folder / RESULT, "about": about}
        metrics = evaluation.run(plan, *loaded, **settled)
    marker = json.dumps({"identity": _identity(context, task), "metrics": metrics})
    from_primary(lambda: write_atomically(folder / FINISHED, marker.encode()))
    return metrics


def _finished(context: Context, name: str, task: Task) -> dict[str, float] | None:
    """The metrics of a task that an earlier run finished."""
    path = context.output / name / FINISHED
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("identity") != _identity(context, task):
        raise UserError(
            f"--output: {path.parent} is of another checkpoint or other settings (another --output, or remove it)"
        )
    return content["metrics"]


def _identity(context: Context, task: Task) -> str:
    """Says what a result depends on."""
    settings = {key: value for key, value in plain(task).items() if key not in ("name", "group", "rows", "note")}
    about = [settings, str(context.checkpoint.resolve()), context.limit]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def write_answers(path: Path, settings: dict[str, Any]) -> None:
    """Writes the list of answers that `Task.answers` describes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = frequent_answers(settings["annotations"], settings["count"])
    write_atomically(path, json.dumps(answers, ensure_ascii=False, indent=0).encode())


@functools.cache
def _train_function() -> Callable[..., int]:
    """`train` of this checkout's train.py."""
    path = ROOT / "train.py"
    if not path.is_file():
        raise UserError(f"fine-tuning runs train.py of a checkout, and {ROOT} has none")
    return runpy.run_path(str(path))["train"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
