"""Starting weights: which arrays of which checkpoints go where in a new train state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from vlm.errors import UserError, did_you_mean
from vlm.loading import open_extra, open_model
from vlm.schema import InitConfig
from vlm.sharding import Placement
from vlm.tree import flatten, listing, unflatten

EXTRA = "extra"
"""Where an entry of `config.init` takes a checkpoint's own extra state, not its parameters."""


def starting_weights(entries: Sequence[InitConfig], placements: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Opens the checkpoints of `config.init`; values are read when the state is created.

    Args:
      placements: of the whole state.

    Returns:
      Lazy arrays (or, from another training run, arrays on the mesh) by state path: "params/vision/…".

    Raises:
      UserError: an entry that selects nothing, or something that the state has no place for.
    """
    targets = flatten({"params": placements.params, "extra": placements.extra})
    start: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        start |= _one(entry, f"config.init[{number}]", targets, mesh)
    return start


def still_random(start: dict[str, Any], placements: Any) -> str:
    """Names the arrays that no checkpoint fills, for the log; "" when there are none."""
    targets = flatten({"params": placements.params, "extra": placements.extra})
    return listing([path for path in targets if path not in start], 8)


def _one(entry: InitConfig, name: str, targets: dict[str, Placement], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    opened = None if entry.into == EXTRA else open_model(entry.path)
    offered = opened.params if opened is not None else open_extra(entry.path)
    if not offered:
        raise UserError(f"{name}: {entry.path} keeps no extra state (teacher, queues) beside its parameters")
    try:
        wanted = [path for path in offered if re.fullmatch(entry.include, path)]
    except re.error as error:
        raise UserError(f"{name}.include: {entry.include!r} is not a regular expression: {error}") from None
    if not wanted:
        raise UserError(f"{name}.include: {entry.include!r} matches none of {listing(list(offered), 4)}")
    places = {path: f"{entry.into}/{path}" for path in wanted}
    strangers = [place for place in places.values() if place not in targets]
    if strangers:
        raise UserError(
            f"{name}: the run has no place for {listing(strangers, 4)}{did_you_mean(strangers[0], targets)} "
            "(select with `include`, direct with `into`)"
        )
    if opened is None or opened.run is None:
        return {places[path]: offered[path] for path in wanted}
    return _from_run(opened, places, targets, mesh)


def _from_run(opened: Any, places: dict[str, str], targets: dict[str, Placement], mesh: jax.sharding.Mesh) -> Any:
    """The selected parameters of another training run, restored onto this run's layout; the others are not read."""
    from jax.sharding import NamedSharding, PartitionSpec

    from vlm.checkpoint import restore_params

    def sharding(path: str) -> NamedSharding:
        target = targets[places[path]]  # of another shape: refused later, by name, with both shapes
        fits = target.shape == tuple(opened.params[path].shape)
        return NamedSharding(mesh, target.spec if fits else PartitionSpec())

    shardings = unflatten({path: sharding(path) for path in places})
    _, params = restore_params(opened.run, shardings=shardings, only=places.keys())
    flat = flatten(params)
    return {place: flat[path] for path, place in places.items()}
