"""What a list of tasks holds: how each is run, and what the paper reports on it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlm.data.shards import expand
from vlm.errors import UserError, did_you_mean
from vlm.strict import build, plain

PREFIX = "data/"
"""What paths of data begin with in configurations; `--data` says which folder that is."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      metric: what the paper calls it.
      of: "evaluation/metric" names whose mean it is; they are shares, the table has percentages.
      paper: {model: published number}.
    """

    metric: str
    of: tuple[str, ...]
    paper: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name, group: how the table calls it, and the average that it belongs to.
      rows: what is reported.
      eval: evaluations, as `config.eval` of `vlm.schema`.
      train: FILE:VARIANT of the training configuration, relative to the tasks' file; None: nothing is trained.
      changes: sections and keys whose values replace those of that configuration.
      answers: {"annotations": files, "count": N}: the N most frequent answers become the classes.
      note: shown beside the name.
    """

    name: str
    group: str
    rows: tuple[Row, ...]
    eval: dict[str, Any]
    train: str | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    answers: dict[str, Any] | None = None
    note: str = ""

    def absent(self, data: str) -> list[str]:
        """The files under the folder `data` that the task needs and that are not there."""
        needed = [self.eval, self.changes, self.answers]
        return sorted({path for path in _strings(needed) if _under(path, data) and not _exists(path)})


@dataclasses.dataclass(frozen=True)
class Tasks:
    """All tasks, in the order of the table; a configuration has a tuple of them, each with its name as `key`.

    Attributes:
      compare: whose published numbers are shown.
      averages: groups over whose rows the paper averages, and whose averages the macro average is of.
    """

    tasks: dict[str, Task]
    compare: str
    averages: tuple[str, ...]


def read(config: Any, data: str, compare: str | None = None) -> Tasks:
    """Builds the tasks that a configuration describes; paths in it that begin with data/ move to the folder `data`.

    Raises:
      UserError: an unknown key, a value of another type, a task without rows, or a model without published numbers.
    """
    given = moved(plain(config), data)
    tasks = given.pop("tasks", None)
    if not isinstance(tasks, tuple) or not tasks or not all(isinstance(task, Mapping) for task in tasks):
        raise UserError("config.tasks: expected a tuple of tasks; is this a configuration of `python -m vlm.tasks`?")
    built: dict[str, Task] = {}
    for number, task in enumerate(tasks):
        name = task.get("key")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name in built:
            raise UserError(f"config.tasks[{number}].key: expected a name of its own for each task, found {name!r}")
        built[name] = build(Task, {key: value for key, value in task.items() if key != "key"}, f"tasks.{name}")
    for name, task in built.items():
        if not task.rows or not task.eval:
            raise UserError(f"config.tasks.{name}: expected rows and evaluations")
        for row in task.rows:
            if strangers := [of for of in row.of if of.split("/")[0] not in task.eval]:
                raise UserError(f"config.tasks.{name}.rows: {strangers[0]!r} names none of {', '.join(task.eval)}")
    settings = dataclasses.replace(build(Tasks, {**given, "tasks": {}}, ""), tasks=built)
    known = {model for task in built.values() for row in task.rows for model in row.paper}
    if (compare or settings.compare) not in known:
        raise UserError(f"--compare: no numbers of {compare!r}{did_you_mean(compare or settings.compare, known)}")
    return settings


def moved(value: Any, data: str) -> Any:
    """`value` with the folder `data` in the place of the beginning "data/" of every string in it."""
    if isinstance(value, str):
        return os.path.join(data, value.removeprefix(PREFIX)) if value.startswith(PREFIX) else value
    if isinstance(value, Mapping):
        return {key: moved(item, data) for key, item in value.items()}
    return type(value)(moved(item, data) for item in value) if isinstance(value, (tuple, list)) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _under(path: str, data: str) -> bool:
    return path.startswith(os.path.join(data, ""))


def _exists(path: str) -> bool:
    if os.path.exists(path):
        return True
    try:
        return bool(expand(path))
    except UserError as error:
        return not str(error).startswith(("missing shard", "no file matches"))
