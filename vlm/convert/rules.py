"""Declarative two-way tables between a foreign checkpoint's names and our parameter paths.

One table serves import and export. Import proves that every foreign tensor is used or knowingly ignored, that every
parameter is filled exactly once and that all shapes agree, and reports all problems at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm.convert.transforms import IDENTITY, Transform
from vlm.convert.views import TensorView, stack, unstack
from vlm.errors import UserError
from vlm.tree import MAX_LISTED

_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        foreign: the foreign name. `{i}` is a layer number: the layers are stacked along a new leading axis. `(a|b)`
            accepts either spelling and writes the first. `*` is anything (ignored names only).
        ours: the parameter path, several for a transform with several results, or None: known and ignored.
        transform: the change of layout.
        duplicate: the same values stored again under a second name: fills the parameter when the first name is absent,
            must equal it otherwise, and is written only on request.
        layers: only these layer numbers, stacked in this order (default: 0, 1, 2 ... without a gap).
    """

    foreign: str
    ours: str | tuple[str, ...] | None
    transform: Transform = IDENTITY
    duplicate: bool = False
    layers: range | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameter paths as a tuple; empty where the name is ignored."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours or ()

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression of the foreign name; its group "i" is the layer number."""
        parts = re.split(r"(\{i\}|\([^()]*\)|\*)", self.foreign)
        tokens = {"{i}": r"(?P<i>0|[1-9]\d{0,4})", "*": ".*"}
        return re.compile("".join(tokens.get(p) or (_choice(p) if p[:1] == "(" else re.escape(p)) for p in parts))

    def name(self, layer: int | None = None) -> str:
        """The foreign name to write."""
        name = re.sub(r"\(([^()|]*)[^()]*\)", r"\1", self.foreign)
        return name if layer is None else name.replace("{i}", str(layer))


def _choice(group: str) -> str:
    return "(?:" + "|".join(re.escape(spelling) for spelling in group[1:-1].split("|")) + ")"


def prefixed(rules: Iterable[Rule], foreign: str, ours: str) -> list[Rule]:
    """Returns the rules of a submodule with prefixes on both sides (pattern syntax allowed in `foreign`)."""

    def rename(rule: Rule) -> Rule:
        paths = tuple(ours + path for path in rule.paths)
        return dataclasses.replace(
            rule, foreign=foreign + rule.foreign, ours=paths[0] if isinstance(rule.ours, str) else paths or None
        )

    return [rename(rule) for rule in rules]


@contextlib.contextmanager
def sizes_from(tensors: Mapping[str, TensorView], rules: Sequence[Rule], source: str) -> Iterator[None]:
    """For code that reads an architecture off tensors: the first that is missing becomes a report of all problems.

    Raises:
        UserError: inside, a parameter's path was looked up that no tensor fills.
    """
    try:
        yield
    except KeyError as error:
        import_tensors(tensors, rules, None, source=source)  # raises, unless all that is there is in order
        raise UserError(f"{source}: missing {error.args[0]}, without which sizes are unknown") from None


def import_tensors(
    tensors: Mapping[str, TensorView],
    rules: Sequence[Rule],
    target: Mapping[str, Any] | None,
    *,
    source: str,
    partial: bool = False,
) -> dict[str, TensorView]:
    """Maps foreign tensors to parameters, lazily: {path: view} with exactly the paths of `target`.

    Args:
        tensors: the foreign tensors by name.
        rules: the table; for every name the first rule that matches counts.
        target: anything with a `shape` by parameter path: what the architecture needs. None while the architecture is
            not known yet: whatever the tensors fill is returned, and duplicates are not compared.
        source: names the checkpoint and its layout in the error.
        partial: returns what can be filled whatever else is wrong, for a second, strict call to report it all at once.

    Raises:
        UserError: unknown names, gaps between layers, parameters missing, filled twice or of another shape; duplicates
            that differ. All problems in one message, the first twenty in words.
    """
    problems: list[str] = []
    claimed = _claim(tensors, rules, problems)
    filled: dict[str, TensorView] = {}
    origin: dict[str, str] = {}
    doubles: list[tuple[str, TensorView, str]] = []
    for rule, names in claimed:
        if not names or rule.ours is None:
            continue
        for path, view in _apply(rule, names, tensors, problems).items():
            if path not in filled:
                filled[path], origin[path] = view, rule.foreign
            elif rule.duplicate:
                doubles.append((path, view, rule.foreign))
            else:
                problems.append(f"{path} is filled by {origin[path]} and by {rule.foreign}")
    if target is not None:
        _check_target(filled, target, rules, origin, problems)
    if target is not None and not problems:
        problems += [
            f"{name} differs from {origin[path]}" for path, view, name in doubles if not equal(view, filled[path])
        ]
    if problems and not partial:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise UserError(f"{source}: {len(problems)} problems: {'; '.join(problems[:MAX_LISTED])}{more}")
    return filled if target is None else {path: filled[path] for path in target}


def export_tensors(
    params: Mapping[str, TensorView], rules: Sequence[Rule], *, target: str = "export", duplicates: bool = False
) -> dict[str, TensorView]:
    """The table backwards: {foreign name: view}, every parameter written exactly once (and under the names of
    `duplicate` rules again, on request).

    Raises:
        UserError: parameters that no rule writes, or only a part of what a fused tensor needs.
    """
    written: dict[str, TensorView] = {}
    done: set[str] = set()
    problems: list[str] = []
    for rule in rules:
        again = rule.duplicate and duplicates
        present = [path for path in rule.paths if path in params and (again or path not in done)]
        if (rule.duplicate and not duplicates) or not present:
            continue
        if len(present) != len(rule.paths):
            problems.append(f"{rule.foreign} needs {', '.join(rule.paths)}, found only {', '.join(present)}")
            continue
        views = [params[path] for path in rule.paths]
        done.update(rule.paths)
        if "{i}" in rule.foreign:
            for position, layer in enumerate(rule.layers or range(views[0].shape[0])):
                written[rule.name(layer)] = rule.transform.backward([unstack(view, position) for view in views])
        else:
            written[rule.name()] = rule.transform.backward(views)
    problems += [f"{path} has no name in this format" for path in params if path not in done]
    if problems:
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise UserError(f"{target}: {'; '.join(problems[:MAX_LISTED])}{more}")
    return written


def _claim(
    tensors: Iterable[str], rules: Sequence[Rule], problems: list[str]
) -> list[tuple[Rule, dict[int | None, str]]]:
    """Gives every foreign name to the first rule that matches it: (rule, {layer number or None: name})."""
    claimed: list[tuple[Rule, dict[int | None, str]]] = [(rule, {}) for rule in rules]
    for name in sorted(tensors):
        for rule, names in claimed:
            match = rule.pattern.fullmatch(name)
            layer = int(match["i"]) if match and "{i}" in rule.foreign else None
            if not match or (layer is not None and rule.layers is not None and layer not in rule.layers):
                continue
            if layer in names and rule.ours is not None:
                problems.append(f"{names[layer]} and {name} are the same parameter")
            names[layer] = name
            break
        else:
            problems.append(f"unknown tensor {name}")
    return claimed


def _apply(
    rule: Rule, names: dict[int | None, str], tensors: Mapping[str, TensorView], problems: list[str]
) -> dict[str, TensorView]:
    """Transforms the tensors of one rule and stacks layers."""
    expected = rule.layers or range(len(names)) if "{i}" in rule.foreign else (None,)
    absent = [rule.name(layer) for layer in expected if layer not in names]
    if absent:
        problems.append(f"missing tensor {absent[0]}" + (f" and {len(absent) - 1} more layers" if absent[1:] else ""))
        return {}
    results: list[tuple[TensorView, ...]] = []
    for layer in expected:
        view = tensors[names[layer]]
        try:
            parts = rule.transform.forward(view)
        except ValueError as error:
            problems.append(f"{names[layer]}: {error}, found shape {list(view.shape)}")
            return {}
        if results and [(p.shape, p.dtype) for p in parts] != [(p.shape, p.dtype) for p in results[0]]:
            problems.append(f"{names[layer]}: shape {list(view.shape)} {view.dtype} differs from the layers before it")
            return {}
        results.append(parts)
    if "{i}" not in rule.foreign:
        return dict(zip(rule.paths, results[0], strict=True))
    return {path: stack([parts[k] for parts in results]) for k, path in enumerate(rule.paths)}


def _check_target(
    filled: Mapping[str, TensorView],
    target: Mapping[str, Any],
    rules: Sequence[Rule],
    origin: Mapping[str, str],
    problems: list[str],
) -> None:
    for path, leaf in target.items():
        if path not in filled:
            names = [rule.foreign for rule in rules if path in rule.paths]
            problems.append(f"missing {path}" + (f" (from {names[0]})" if names else ""))
        elif filled[path].shape != tuple(leaf.shape):
            found, expected = list(filled[path].shape), list(leaf.shape)
            problems.append(f"{path}: expected shape {expected}, found {found} (from {origin[path]})")
    problems += [f"{origin[path]} has no place in this architecture" for path in filled if path not in target]


def equal(a: TensorView, b: TensorView) -> bool:
    """Whether two lazy arrays have the same shape, type and bytes; they are read in blocks of rows."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.shape:
        return a.read().tobytes() == b.read().tobytes()
    rows = max(1, _CHUNK * a.shape[0] // max(a.size, 1))
    blocks = [(slice(start, start + rows),) for start in range(0, a.shape[0], rows)]
    return all(np.array_equal(_bytes(a.read(block)), _bytes(b.read(block))) for block in blocks)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
