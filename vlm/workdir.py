"""The folder of a run: who may write to it, which configuration and environment it belongs to, sample images.

config.json       the resolved configuration          metrics.jsonl, events.out.tfevents.*   see `vlm.metrics`
env.json          versions, devices, git commit       samples/                               images of the first batch
checkpoints/      see `vlm.checkpoint`                processor/                             tokenizer, image settings
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import diff, parse_config_flag, to_json
from vlm.errors import UserError
from vlm.manifest import write_atomically

PACKAGES = ("vlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "ml-collections")
MAX_SHOWN = 8


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing: a temporary name, fsync, rename."""
    write_atomically(path, text.encode())


@contextlib.contextmanager
def claim(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Creates the folder and keeps other runs out of it; the claim ends with the process, however it ends.

    A folder that was made here and in which nothing has been recorded by then (the run was refused) goes away again.
    `flag` is what named the folder, for errors.

    Raises:
      UserError: another process writes to it, or it is not a folder that can be written to and locked.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{flag}: cannot write to {workdir}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{flag}: another process is writing to {workdir}") from None
        except OSError as error:  # a file system without locks, for instance
            raise UserError(f"{flag}: cannot lock {workdir / '.lock'}: {error.strerror}") from None
        try:
            yield
        finally:
            if made and not any(path.is_file() and path.name != ".lock" for path in workdir.rglob("*")):
                _remove(workdir, made)


def _remove(workdir: Path, made: Sequence[Path]) -> None:
    """Removes a folder without records, and those above it that were made for it."""
    folders = sorted((path for path in workdir.rglob("*") if path.is_dir()), reverse=True)
    with contextlib.suppress(OSError):
        for lock in list(workdir.rglob(".lock")):
            lock.unlink()
        for folder in (*folders, *made):
            folder.rmdir()


def check_config(workdir: Path, config: Any, allow_change: bool = False) -> None:
    """Refuses a folder that was started with another configuration. Another mesh goes on: it changes roundings only.

    Raises:
      UserError: with the difference, up to a few keys.
    """
    path = workdir / "config.json"
    if not path.exists() or allow_change:
        return
    changes = [line for line in diff(parse_config_flag(str(path)), config) if not line.startswith("sharding.mesh")]
    if changes:
        more = f"; and {len(changes) - MAX_SHOWN} more" if len(changes) > MAX_SHOWN else ""
        raise UserError(
            f"--workdir: {workdir} was started with another configuration: {'; '.join(changes[:MAX_SHOWN])}{more} "
            "(another workdir, or --allow_config_change to go on with the new one)"
        )


def record(workdir: Path, config: Any, processor: Any) -> None:
    """Writes what belongs to the weights (`config.json`, the processor's files) and `env.json`, one entry per start."""
    processor.save(workdir / "processor")
    write_text(workdir / "config.json", to_json(config))
    path, starts = workdir / "env.json", []
    if path.exists():
        with contextlib.suppress(ValueError):
            starts = json.loads(path.read_text(encoding="utf-8"))
    starts = starts if isinstance(starts, list) else []
    write_text(path, json.dumps([*starts, environment()], indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, devices, git commit, command line: what a number depends on beside the configuration."""
    import jax

    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    kinds = [device.device_kind for device in jax.devices()]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the code, with "+" when files differ from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        run = lambda *command: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Samples:
    """Keeps pictures of a run's batches: of the first one with each set of arrays."""

    def __init__(self, workdir: Path, count: int):
        self._workdir, self._count = workdir, count
        self._seen: set[frozenset[str]] = set()

    def keep(self, step: int, batch: Mapping[str, Any]) -> None:
        """Writes the first images of this host, unless a batch with these arrays was seen before."""
        arrays = frozenset(batch) - {"packing"}  # which a batch of long texts lacks
        if "image" in batch and arrays not in self._seen:
            save_samples(self._workdir, batch["image"].addressable_data(0), step, self._count)
        self._seen.add(arrays)


def save_samples(workdir: Path, images: Any, step: int, count: int) -> Path | None:
    """Writes a PNG grid of the first images of a batch [B, H, W, 3], each stretched to the full range of grey."""
    images = np.nan_to_num(np.asarray(np.asarray(images)[:count], np.float32))  # not on the devices
    if images.ndim != 4 or not len(images) or images.shape[-1] != 3:
        return None
    from PIL import Image

    low, high = images.min(axis=(1, 2, 3), keepdims=True), images.max(axis=(1, 2, 3), keepdims=True)
    pixels = np.round((images - low) / np.maximum(high - low, 1e-6) * 255).astype(np.uint8)
    columns = math.ceil(len(pixels) ** 0.5)
    rows = math.ceil(len(pixels) / columns)
    height, width = pixels.shape[1:3]
    grid = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    path = workdir / "samples" / f"step_{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(grid).save(path)
    return path
