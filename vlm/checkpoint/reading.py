"""Reading checkpoints: arrays onto any mesh, proof that they are what was saved, parameters alone.

Reading always names the arrays that are wanted, with shape, dtype and sharding; without them orbax refuses what
another number of processes wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Sharding, SingleDeviceSharding

from vlm.checkpoint.fingerprint import fingerprints, host_fingerprint
from vlm.checkpoint.leaves import Records, named_leaves
from vlm.checkpoint.processes import from_primary
from vlm.checkpoint.steps import step_numbers
from vlm.errors import UserError
from vlm.manifest import MANIFEST_NAME, read_manifest, verify_manifest
from vlm.tree import flatten, listing, unflatten

CHECKPOINTS = "checkpoints"  # the folder in a training workdir
FULL_CHECK_BYTES = 8 * 2**30
_GROUP_BYTES = 256 * 2**20  # read at once while checking without a device


def read_arrays(path: Path, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the named arrays of a step onto the devices that the targets' shardings name.

    Values are bit-exact whatever mesh wrote them. Whatever orbax raises on damaged files passes through.
    """
    stored = {name: target for name, target in targets.items() if math.prod(target.shape)}
    args = {
        name: ocp.ArrayRestoreArgs(sharding=target.sharding, global_shape=target.shape, dtype=target.dtype)
        for name, target in stored.items()
    }
    arrays = _restore(path, stored, args)
    for name in stored:
        if not isinstance(arrays.get(name), jax.Array):  # orbax believes its own index, damaged or not
            raise UserError(f"{path}: {name} is not in the checkpoint, although its manifest lists it")
    for name in targets.keys() - stored.keys():  # orbax does not store empty arrays
        target = targets[name]
        arrays[name] = jax.jit(_zeros(target), out_shardings=target.sharding)()
    return arrays


def wrong_leaves(arrays: Mapping[str, jax.Array], records: Records) -> list[str]:
    """Names of arrays whose values are not those that were in memory when the step was saved."""
    prints = fingerprints(arrays)
    return [name for name in arrays if prints[name].digest != records[name]["hash"]]


def wrong_on_disk(path: Path, records: Records) -> list[str]:
    """As `wrong_leaves`, for a whole step and through host memory only, some arrays at a time."""
    wrong = []
    for group in _groups(records):
        arrays = read_on_host(path, {name: records[name] for name in group})
        wrong += [name for name in group if wrong_values(arrays[name], records[name])]
    return wrong


def read_on_host(path: Path, records: Records) -> dict[str, np.ndarray]:
    """The recorded leaves, none of them empty, as orbax finds them; not verified."""
    targets = {
        name: jax.ShapeDtypeStruct(tuple(record["shape"]), jax.numpy.dtype(record["dtype"]))
        for name, record in records.items()
    }
    arrays = _restore(path, targets, {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in records})
    return {name: np.asarray(arrays[name]) for name in records}


def wrong_values(array: np.ndarray, record: Mapping[str, Any]) -> bool:
    """Whether a leaf in host memory is not what its record says."""
    same = array.shape == tuple(record["shape"]) and array.dtype == jax.numpy.dtype(record["dtype"])
    return not same or host_fingerprint(array).digest != record["hash"]


def verify_step(path: str | Path) -> dict[str, Any]:
    """Checks everything there is to check of one step directory and returns its manifest.

    Raises:
        UserError: naming the file or the leaves that are wrong.
    """
    path = Path(path).resolve()
    manifest = check_files(path, "full")
    if wrong := wrong_on_disk(path, manifest["extra"]["leaves"]):
        raise UserError(f"{path}: values differ from those that were saved: {listing(wrong)}")
    return manifest


def check_files(path: Path, level: Literal["auto", "full", "fast"] = "auto") -> dict[str, Any]:
    """Checks a step directory's files against its manifest, which is returned.

    "full" hashes every file; "fast" compares sizes, and leaves it to the fingerprints to find wrong values and to
    a second, full check to name the file. "auto" is "full" up to 8 GiB and says so where it is not.

    Raises:
        UserError: naming what is wrong; also when the manifest is of another step or of a model folder.
    """
    manifest = read_manifest(path)
    if "leaves" not in manifest["extra"]:
        raise UserError(f"{path} holds no training step, although it has a manifest")
    if str(manifest["extra"]["step"]) != path.name:
        raise UserError(f"{path}: holds step {manifest['extra']['step']}, not the step in its name")
    size = sum(file["size"] for file in manifest["files"].values())
    if level == "auto" and size > FULL_CHECK_BYTES:
        logging.warning("%s is %.1f GiB: checked by sizes and fingerprints", path, size / 2**30)
        level = "fast"
    return verify_manifest(path, "fast" if level == "fast" else "full")


def find_step(path: str | Path) -> Path:
    """The step directory that a path means: itself, or the newest of a workdir or checkpoints folder.

    The first process looks and all take what it finds: a run that goes on saving must not show one step to this host
    and the next one to another. All processes call it together.

    Raises:
        UserError: the path holds no checkpoint.
    """
    return Path(from_primary(lambda: str(_newest(Path(path)))))


def _newest(path: Path) -> Path:
    if (path / MANIFEST_NAME).is_file():
        return path.resolve()  # its name is the step, even for "."
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = step_numbers(folder)
    if not steps:
        raise UserError(f"{path}: no checkpoint found; expected a training workdir or one of its step directories")
    return folder / str(steps[-1])


def abstract_params(path: str | Path, *, ema: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a run and its parameters as a nested dict of shapes and dtypes; reads no weights.

    Args:
        path: a training workdir (its newest step) or a step directory.
        ema: the averaged parameters where there are some; parameters without an average stay as they are.

    Raises:
        UserError: no checkpoint there, a damaged one, no `config.json` beside it, or no averages.
    """
    config, _, stored = _params_on_disk(path, ema, "fast")
    shapes = {name: target for name, (_, target) in stored.items()}
    return config, unflatten(shapes)


def restore_params(
    path: str | Path,
    *,
    ema: bool = False,
    shardings: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the configuration and the parameters of a run, not its optimizer.

    Values are verified against the fingerprints taken when they were saved. Unlike a training run that resumes,
    this does not fall back to an older step: a measurement must not silently be of other weights.

    Args:
        path, ema: see `abstract_params`.
        shardings: a nested dict like the parameters; each process reads its own slices. None: the first device.
        only: paths ("vision/class_embedding") of the parameters to read; the others stay on disk. None: all.

    Returns:
        `config.json` as a dict, and the parameters as a nested dict of jax arrays.

    Raises:
        UserError: see `abstract_params`; a path in `only` that the run lacks; the file or the leaves that are damaged.
    """
    config, step, stored = _params_on_disk(path, ema, "auto")
    if only is not None:
        if absent := [name for name in only if name not in stored]:
            raise UserError(f"{step}: holds no parameters {listing(absent)}")
        stored = {name: stored[name] for name in only}
    wanted: Mapping[str, Sharding] = named_leaves(shardings) if shardings is not None else {}
    if shardings is not None and (missing := [name for name in stored if name not in wanted]):
        raise UserError(f"restore_params: no sharding given for {listing(missing)}")
    default = SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        source: jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=wanted.get(name, default))
        for name, (source, target) in stored.items()
    }
    records = read_manifest(step)["extra"]["leaves"]
    try:
        arrays = read_arrays(step, targets)
    except Exception:
        verify_manifest(step, "full")  # a damaged file is the likely cause, and this names it
        raise
    if wrong := wrong_leaves(arrays, records):
        verify_manifest(step, "full")
        raise UserError(f"{step}: values differ from those that were saved: {listing(wrong)}")
    return config, unflatten({name: arrays[source] for name, (source, _) in stored.items()})


def _params_on_disk(
    path: str | Path, ema: bool, level: Literal["auto", "fast"]
) -> tuple[dict[str, Any], Path, dict[str, tuple[str, jax.ShapeDtypeStruct]]]:
    """The configuration, the step directory, and {parameter: (leaf that holds it, shape and dtype)}."""
    step = find_step(path)
    manifest = check_files(step, level)
    records: Records = manifest["extra"]["leaves"]
    names = [name.removeprefix("params/") for name in records if name.startswith("params/")]
    if not names:
        raise UserError(f"{step}: holds no parameters; its leaves are {listing(list(records))}")
    averaged = {name for name in names if f"ema/{name}" in records}
    if ema and not averaged:
        raise UserError(f"{step}: holds no averaged parameters; the run was trained without EMA")
    stored = {}
    for name in names:
        source = f"ema/{name}" if ema and name in averaged else f"params/{name}"
        record = records[source]
        stored[name] = source, jax.ShapeDtypeStruct(tuple(record["shape"]), jax.numpy.dtype(record["dtype"]))
    return _read_config(step), step, stored


def _read_config(step: Path) -> dict[str, Any]:
    path = step.resolve().parent.parent / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: missing; a step directory is read together with its workdir's config.json")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _restore(path: Path, targets: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.restore(
            path.resolve(),
            args=ocp.args.PyTreeRestore(item=unflatten(targets), restore_args=unflatten(args), partial_restore=True),
        )
    return flatten(tree)


def _groups(records: Records) -> Iterator[list[str]]:
    group, size = [], 0
    for name, record in records.items():
        count = math.prod(record["shape"])
        if not count:
            continue
        group.append(name)
        size += count * jax.numpy.dtype(record["dtype"]).itemsize
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _zeros(target: jax.ShapeDtypeStruct) -> Any:
    return lambda: jax.numpy.zeros(target.shape, target.dtype)
