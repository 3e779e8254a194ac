"""Layouts: which foreign checkpoints a family reads, told apart by the names of their tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlm.convert.rules import Rule
from vlm.convert.views import TensorView
from vlm.errors import UserError
from vlm.tree import listing


@dataclasses.dataclass(frozen=True)
class Layout:
    """One foreign layout.

    Attributes:
        name: what to call it in messages.
        marks: regular expressions; a checkpoint has this layout when each matches the start of some tensor's name.
        rules: the table.
        without: regular expressions, none of which may match.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    without: tuple[str, ...] = ()

    def fits(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names have this layout."""
        names = list(names)
        found = lambda mark: any(re.match(mark, name) for name in names)  # noqa: E731
        return all(map(found, self.marks)) and not any(map(found, self.without))


@dataclasses.dataclass(frozen=True)
class Imported:
    """A foreign checkpoint read as ours.

    Attributes:
        config: the architecture.
        params: lazy parameters by path.
        layout: the name of the layout that was found.
        notes: what the reader should know: assumptions, precedence, warnings, initialised parameters.
        extra: lazy arrays of a training state beside the parameters (teacher, queues), by path.
    """

    config: Any
    params: dict[str, TensorView]
    layout: str
    notes: list[str]
    extra: Mapping[str, TensorView] = dataclasses.field(default_factory=dict)


def detect(layouts: Sequence[Layout], names: Iterable[str], source: str) -> Layout:
    """Returns the first layout that fits.

    Raises:
        UserError: none does; the message shows some of the names and what was looked for.
    """
    names = sorted(names)
    for layout in layouts:
        if layout.fits(names):
            return layout
    known = listing([layout.name for layout in layouts])
    raise UserError(f"{source}: unknown layout with tensors {listing(names, 4)}; known layouts: {known}")
