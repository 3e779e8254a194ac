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
from vlm.checkpoint.processes import from_primary, is_primary
from vlm.checkpoint.reading import find_step
from vlm.config import build, load
from vlm.data.annotations import frequent_answers
from vlm.errors import UserError
from vlm.loading import OpenModel, open_model
from vlm.manifest import content_digest, write_atomically
from vlm.schema import Config, ShardingConfig
from vlm.strict import plain
from vlm.tasks.fitting import fitted
from vlm.tasks.settings import Task, Tasks
from vlm.tokenizers.files import read_json
from vlm.workdir import environment

ROOT = Path(vlm.__file__).resolve().parents[1]
RESULT, STATE = "result.json", "task.json"


@dataclasses.dataclass(frozen=True)
class Context:
    """What all tasks share.

    Attributes:
      checkpoint: of a training workdir the step as of now. content: what tells it from others, whatever its path.
      output: the folder of all results. configs: the configurations' folder.
      data, limit: the command's flags.
    """

    checkpoint: Path
    content: str
    output: Path
    configs: Path
    data: str
    limit: int | None

    @classmethod
    def of(cls, checkpoint: Path, output: Path, configs: Path, data: str, limit: int | None) -> Context:
        """Finds out which checkpoint it is.

        Raises:
          UserError: a training workdir without checkpoint, a damaged manifest.
        """
        step = find_step(checkpoint) if (checkpoint / "checkpoints").is_dir() else checkpoint
        return cls(step, from_primary(lambda: _content(step)), output, configs, data, limit)


def run(settings: Tasks, chosen: Sequence[str], context: Context) -> tuple[dict[str, dict[str, float]], bool]:
    """Runs the chosen tasks whose data is there; results of others that finished before are read.

    Returns:
      {task: {"evaluation/metric": value}} of the tasks that have results, and whether a signal ended a training, which
      was saved.

    Raises:
      UserError: a checkpoint that cannot be opened, or a task that cannot be run: those before it are kept.
    """
    opened = open_model(context.checkpoint, verify="fast")
    from_primary(lambda: context.output.mkdir(parents=True, exist_ok=True))
    metrics: dict[str, dict[str, float]] = from_primary(lambda: _finished(context, settings))
    absent = from_primary(lambda: absent_data(settings, chosen, context.data))
    left = [name for name in settings.tasks if name in chosen and name not in metrics and name not in absent]
    left.sort(key=lambda name: settings.tasks[name].train is not None)  # those of the checkpoint itself share it
    loaded: list[Any] = []
    for name in left:
        task = settings.tasks[name]
        _say(f"{name}: {task.name}")
        from_primary(functools.partial(_note, context, name, task, None))
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
    from_primary(lambda: _note(context, name, task, metrics))
    return metrics


def absent_data(settings: Tasks, chosen: Sequence[str], data: str) -> dict[str, list[str]]:
    """The files that chosen tasks need and that are not there, of each task that lacks some."""
    return {name: missing for name in chosen if (missing := settings.tasks[name].absent(data))}


def _finished(context: Context, settings: Tasks) -> dict[str, dict[str, float]]:
    """The metrics of tasks that an earlier run finished.

    Raises:
      UserError: it had another checkpoint or other settings, in a task that it finished or only began.
    """
    found = {}
    for name, task in settings.tasks.items():
        path = context.output / name / STATE
        if not path.is_file():
            continue
        content, wanted = read_json(path), _identity(context, task)
        known = content.get("identity")
        known = known if isinstance(known, dict) else {}
        if differing := sorted(key for key in wanted if known.get(key) != wanted[key]):
            what = " and ".join(f"another {key}" if key == "checkpoint" else f"other {key}" for key in differing)
            raise UserError(f"--output: {path.parent} is of {what} (another --output, or remove it)")
        if content.get("metrics") is not None:
            found[name] = content["metrics"]
    return found


def _note(context: Context, name: str, task: Task, metrics: dict[str, float] | None) -> None:
    """Notes what a task's folder is of, and when it is finished what was found."""
    path = context.output / name / STATE
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps({"identity": _identity(context, task), "metrics": metrics}).encode())


def _identity(context: Context, task: Task) -> dict[str, str]:
    """What a result depends on."""
    about = {key: value for key, value in plain(task).items() if key not in ("name", "group", "rows", "note")}
    training = task.train and plain(load(str(context.configs / task.train)))
    settings = json.dumps([about, training, context.limit], sort_keys=True)
    return {"checkpoint": context.content, "settings": hashlib.sha256(settings.encode()).hexdigest()}


def _content(checkpoint: Path) -> str:
    """Of a step of a training also of the settings and the tokenizer beside it."""
    digests, folder = [content_digest(checkpoint)], checkpoint.absolute().parent.parent
    if checkpoint.absolute().parent.name == "checkpoints":
        digests += [content_digest(path) for path in (folder / "config.json", folder / "processor") if path.exists()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


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
    if is_primary():
        print(text, file=sys.stderr, flush=True)
