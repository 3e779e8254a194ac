"""How a run starts: from its own newest checkpoint, or new, with arrays of other checkpoints in it."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vlm.checkpoint import Checkpoints
from vlm.errors import UserError, did_you_mean
from vlm.experiment import Experiment
from vlm.loading import OpenModel, load_processor, open_extra, open_model
from vlm.schema import Config, InitConfig
from vlm.sharding import Placement, abstract
from vlm.training import TrainState, init_state
from vlm.tree import flatten, listing, unflatten

EXTRA = "extra"
"""Where an entry of `config.init` takes a checkpoint's own extra state, not its parameters."""
TOKENS = "token_embedding/embedding"
"""How the path of a table ends that a tokenizer's ids select from."""
TEXTS = ("A photo of 2 cats.", "两只猫的照片", "фото двух кошек", "صورة قطتين", "고양이 사진", "रंगीन पतंग", "猫の写真")
"""What tokenizers are compared on."""
Towers = Mapping[str, Any]
FATAL = ("num_heads", "positions", "pad_id")
NOTABLE = ("activation", "norm_eps")
"""Settings of a tower that change what its weights compute, and not their shapes."""


def towers(model: Any, place: str) -> dict[str, Any]:
    """The parts of an architecture that have attention heads, by the path of their parameters below `place`."""
    parts = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    paths = {name: f"{place}/{'text' if name == 'clip_text' else name}" for name in parts}
    return {paths[name]: part for name, part in parts.items() if hasattr(part, "num_heads")}


def towers_of_run(model: Any, loss: Any) -> dict[str, Any]:
    """The same of a run's parameters and of its teacher, which is a copy of them or has its own architecture."""
    teacher = getattr(loss, "teacher", None)
    of_teacher = towers(model, "extra/teacher") if teacher is None else {"extra/teacher/text": teacher}
    return towers(model, "params") | of_teacher


def begin(
    settings: Config,
    parts: Experiment,
    placements: Any,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    fingerprint: str,
    allow_change: bool = False,
    processor: Any = None,
) -> TrainState:
    """The state that a run goes on with: of the newest verified checkpoint, or a new one with `config.init` in it.

    Args:
      placements: of the whole state.
      fingerprint: of the data, which a checkpoint's must equal unless `allow_change`.
      processor: of the run, see `starting_weights`.

    Raises:
      UserError: other data; starting weights that do not fit.
    """
    found = checkpoints.restore(abstract(placements, mesh))
    if found is None:
        run = towers_of_run(parts.model_config, parts.loss_config)
        start = starting_weights(settings.init, placements, mesh, run, processor)
        if jax.process_index() == 0 and start and (random := still_random(start, placements)):
            print(f"not in the starting weights, so as of a new run: {random}", file=sys.stderr)
        return init_state(parts.init, placements, mesh, settings.train.seed, start)
    state, step, position = found
    if position.get("fingerprint") != fingerprint and not allow_change:
        raise UserError(f"the data differ from those up to step {step} (--allow_config_change to go on with them)")
    if jax.process_index() == 0:
        print(f"resumed from step {step}", file=sys.stderr)
    return state


def starting_weights(
    entries: Sequence[InitConfig],
    placements: Any,
    mesh: jax.sharding.Mesh,
    run: Towers | None = None,
    processor: Any = None,
) -> dict[str, Any]:
    """Opens the checkpoints of `config.init`; values are read when the state is created.

    Args:
      placements: of the whole state.
      run: `towers_of_run`, which the checkpoints' are compared with.
      processor: of the run, whose tokenizers are compared with those of checkpoints that give embeddings of tokens.

    Returns:
      Lazy arrays (or, from another training run, arrays on the mesh) by state path: "params/vision/…".

    Raises:
      UserError: an entry that selects nothing, something that the state has no place for, or weights of a tower with
        other heads or positions than the run's. What else differs, another tokenizer, and what reading a checkpoint
        took for granted, is logged.
    """
    targets = flatten({"params": placements.params, "extra": placements.extra})
    start: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        start |= _one(entry, f"config.init[{number}]", targets, mesh, run or {}, processor)
    return start


def still_random(start: dict[str, Any], placements: Any) -> str:
    """Names the arrays that no checkpoint fills, for the log; "" when there are none."""
    targets = flatten({"params": placements.params, "extra": placements.extra})
    return listing([path for path in targets if path not in start], 8)


def _one(
    entry: InitConfig,
    name: str,
    targets: dict[str, Placement],
    mesh: jax.sharding.Mesh,
    run: Towers,
    processor: Any = None,
) -> dict[str, Any]:
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
    if opened is not None:
        filled = {at: tower for at, tower in run.items() if any(p.startswith(f"{at}/") for p in places.values())}
        _compare(f"{name}: {entry.path}", towers(opened.config, entry.into), filled, opened.notes)
        if processor is not None and jax.process_index() == 0:
            _compare_tokenizers(f"{name}: {entry.path}", opened, list(places.values()), processor)
    if opened is None or opened.run is None:
        return {places[path]: offered[path] for path in wanted}
    return _from_run(opened, places, targets, mesh)


def _compare(name: str, source: Towers, run: Towers, notes: Sequence[str]) -> None:
    """Weights fit towers of the same shapes, but compute the same only with the same heads, positions, activation."""
    lines = [f"{name}: {note}" for note in notes]
    for place, ours in run.items():
        if (theirs := source.get(place)) is None:
            continue
        changed = {key: pair for key in (*FATAL, *NOTABLE) if len(set(pair := _values(key, theirs, ours))) > 1}
        told = ", ".join(f"{key} {a} there and {b} in the run" for key, (a, b) in changed.items())
        if changed.keys() & set(FATAL):
            raise UserError("; ".join([f"{name}: {place} was trained with another architecture: {told}", *notes]))
        if changed:
            lines.append(f"{name}: {place} computes other values than it was trained to: {told}")
    if jax.process_index() == 0:
        for line in lines:
            logging.getLogger("vlm").warning("%s", line)


def _compare_tokenizers(name: str, opened: OpenModel, places: Sequence[str], processor: Any) -> None:
    """Logs where embeddings of tokens come from a checkpoint whose own tokenizer gives other ids than the run's."""
    tables = [place.removesuffix(f"/{TOKENS}") for place in places if place.endswith(f"/{TOKENS}")]
    if not tables:
        return
    teachers = tables[0].startswith("extra/") and hasattr(processor, "teacher_tokenizer")
    key = "teacher_tokenizer" if teachers else "tokenizer"
    ours = getattr(processor, key, None)
    try:
        theirs = getattr(load_processor(opened), "tokenizer", None)
    except UserError:  # only its weights are used
        return
    told = _differences(theirs, ours) if None not in (ours, theirs) else ""
    if told:
        trained = f"{', '.join(tables)} was trained with another tokenizer than config.processor.{key}"
        logging.getLogger("vlm").warning("%s: %s: %s", name, trained, told)


def _differences(theirs: Any, ours: Any) -> str:
    """In which size, special ids or first of a few texts two tokenizers differ; "" where in none."""
    keys = ("vocab_size", "pad_id", "bos_id", "eos_id", "unk_id", "mask_id")
    values = [(key, getattr(theirs, key, None), getattr(ours, key, None)) for key in keys]
    pairs = ((repr(text), *(tokenizer([text])["tokens"][0].tolist() for tokenizer in (theirs, ours))) for text in TEXTS)
    found = [value for value in values if value[1] != value[2]] or [pair for pair in pairs if pair[1] != pair[2]][:1]
    return ", ".join(f"{what} {a} there and {b} in the run" for what, a, b in found)


def _values(key: str, *parts: Any) -> tuple[Any, ...]:
    """A setting of two towers, of which one may be of a kind that has no choice."""
    if key == "pad_id" and any(getattr(part, "positions", "") != "roberta" for part in parts):
        return (None, None)  # where positions do not depend on it
    return tuple(getattr(part, key, "absolute" if key == "positions" else None) for part in parts)


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
