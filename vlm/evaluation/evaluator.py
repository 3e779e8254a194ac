"""What every evaluator is: settings checked and data opened first, then one call that returns a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from vlm.data.source import Source, Subset, open_source
from vlm.errors import UserError, did_you_mean
from vlm.evaluation.bootstrap import Statistic, intervals
from vlm.evaluation.embed import Embedder
from vlm.evaluation.feed import Advance, Note
from vlm.strict import plain


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluator found.

    Attributes:
      metrics: numbers by name. intervals: 95 % bootstrap confidence interval of some of them.
      n: examples that count; unreadable: examples of the data that could not be read and do not count.
      details: what the numbers depend on (data and template fingerprints, language, …), for the JSON result.
      examples: one JSON object per example, for the JSONL file.
      page: what the HTML page shows beside the examples, see `vlm.evaluation.page`.
      official: predictions in the form that the data set's own evaluation reads, for a JSON file of their own.
    """

    kind: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    n: int
    unreadable: int
    details: dict[str, Any]
    examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    page: dict[str, Any] = dataclasses.field(default_factory=dict)
    official: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Evaluator(Protocol):
    """One prepared evaluation. Making it has checked all that can be checked without a model."""

    @property
    def size(self) -> int:
        """Examples to go through, for progress."""
        ...

    @property
    def uses_text(self) -> bool:
        """Whether the model's text tower is needed."""
        ...

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Runs the model over the data; every host calls it and every host gets the result."""
        ...


@runtime_checkable
class Checks(Protocol):
    """An evaluator of something else than embeddings: it finds out itself whether a model can do it."""

    def check(self, embedder: Embedder) -> None:
        """Traces the model without running it; raises UserError where it, or the processor, cannot."""
        ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Bootstrap settings: resamples (0: no intervals) and their seed."""

    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0 or self.seed < 0:
            raise ValueError(f"expected resamples and seed of at least 0, found {self.resamples} and {self.seed}")

    def intervals(self, statistic: Statistic, clusters: int) -> dict[str, tuple[float, float]]:
        """See `vlm.evaluation.bootstrap.intervals`."""
        return intervals(statistic, clusters, resamples=self.resamples, seed=self.seed)


def open_data(spec: Mapping[str, Any], path: str, limit: int | None = None) -> Source:
    """The source of an evaluation, cut to its first `limit` examples.

    Raises:
      UserError: as `open_source`, with where the section stands in the configuration.
    """
    try:
        source = open_source(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Subset(source, f"[0:{limit}]") if limit is not None and limit < len(source) else source


@dataclasses.dataclass(frozen=True)
class Task:
    """What evaluations of one data set have in common; each declares its own type of `config`.

    Attributes:
      config: the settings, of which `data` describes the source.
      source: the data.
    """

    config: Any
    source: Source

    @classmethod
    def prepare(cls, config: Any, path: str, limit: int | None = None) -> Self:
        """Opens the data and looks at its first example.

        Raises:
          UserError: one of them is wrong.
        """
        return cls._open(config, path, limit)

    @classmethod
    def _open(cls, config: Any, path: str, limit: int | None, *more: Any) -> Self:
        """`cls(config, source, *more)`, once its `note` has accepted the first readable example."""
        task = cls(config, open_data(config.data, f"{path}.data", limit), *more)
        first_note(task.source, task.note)
        return task

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.source)

    @property
    def uses_text(self) -> bool:
        """Whether the text tower of a contrastive model is needed."""
        return False

    def note(self, example: Mapping[str, Any]) -> Note:
        """What is kept of an example: its key."""
        return {"key": str(example.get("key"))}


def images_key(spec: Mapping[str, Any], source: Source) -> str:
    """Says which images a source holds, whatever other fields it reads beside them."""
    given = plain(spec)
    others = {name: value for name, value in given.items() if name != "fields"}
    return repr([sorted(others.items()), (given.get("fields") or {}).get("image"), len(source)])


def first_note(source: Source, note: Any) -> Note:
    """The note of the first example that can be read: finds fields that no example has before the model runs.

    Raises:
      UserError: what `note` says about it.
    """
    for index in range(min(len(source), 16)):
        try:
            example = source[index]
        except UserError:
            continue
        return note(example)
    return {}


def field(example: Mapping[str, Any], name: str) -> Any:
    """A field of a raw example.

    Raises:
      UserError: the example has none of this name.
    """
    if name not in example:
        raise UserError(f"example {example.get('key')!r} has no field {name!r}{did_you_mean(name, example)}")
    return example[name]


def class_number(example: Mapping[str, Any], name: str, names: Sequence[str] = ()) -> int:
    """The class number in a field that holds a number or one of `names`.

    Raises:
      UserError: it holds something else, or a number outside `names`.
    """
    return parse_class(field(example, name), names, f"example {example.get('key')!r}")


def parse_class(value: Any, names: Sequence[str], where: str) -> int:
    """One label, a number or one of `names`, as a class number; `where` names the example in errors."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str) and value.strip() in names:
        return list(names).index(value.strip())
    try:
        number = int(value)
        if isinstance(value, float) and value != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        hint = did_you_mean(value, names) if isinstance(value, str) and names else ""
        expected = "a class number or name" if names else "a class number"
        raise UserError(f"{where}: expected {expected} as label, found {value!r:.60}{hint}") from None
    if number < 0 or (names and number >= len(names)):
        raise UserError(f"{where}: label {number} is outside the {len(names)} class names")
    return number
