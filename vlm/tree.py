"""Parameters as plain nested dicts, addressed by paths such as "text/layers/mlp/up/kernel".

Rules over paths (freeze, decay, shard, convert) are lists of (regular expression, value): the first that matches
the whole path wins, and `match_first` proves that every path is covered and that no rule is dead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vlm.errors import UserError

V = TypeVar("V")
MAX_LISTED = 20


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"a/b/c": leaf} of a nested dict, in the tree's order. Empty subtrees vanish.

    Raises:
        UserError: a key is not a string, is empty or contains a slash, so that the path would be ambiguous.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise UserError(f"parameter name {key!r} must be a non-empty string without '/'")
        if isinstance(value, Mapping):
            flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, V]) -> dict[str, Any]:
    """Returns the nested dict whose paths are the keys of `flat`: the inverse of `flatten`.

    Raises:
        UserError: one path is the beginning of another, so that it would be a leaf and a subtree at once.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"parameter path {path!r} goes through a leaf")
        if name in node:
            raise UserError(f"parameter path {path!r} is a leaf and a subtree at once")
        node[name] = leaf
    return tree


def match_first(rules: Sequence[tuple[str, V]], paths: Iterable[str]) -> dict[str, V]:
    """Gives every path the value of the first rule whose regular expression matches the whole path.

    Raises:
        UserError: listing every path that no rule matches and every rule that matches no path at all (a rule
            whose paths are all claimed by earlier rules is fine: a final ".*" may find nothing left).
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"path rule {error.pattern!r} is not a regular expression: {error}") from None
    matched: dict[str, V] = {}
    uncovered, alive = [], set()
    for path in paths:
        hits = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)]
        alive.update(hits)
        if hits:
            matched[path] = compiled[hits[0]][1]
        else:
            uncovered.append(path)
    dead = [pattern for i, (pattern, _) in enumerate(rules) if i not in alive]
    problems = []
    if uncovered:
        problems.append(f"no rule matches {listing(uncovered)}")
    if dead:
        problems.append(f"nothing matches the rule {listing(dead)}")
    if problems:
        raise UserError("path rules do not fit: " + "; ".join(problems))
    return matched


def listing(names: Sequence[str], limit: int = MAX_LISTED) -> str:
    """Returns the first names, comma separated, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
