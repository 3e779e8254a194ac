"""The folder of a run's checkpoints: which steps it holds, who may write, what is set aside or deleted.

    checkpoints/
        400/                                    a committed step: orbax files and vlm_manifest.json
        500.unverified/                         being written; renamed to 500 when its manifest is durable
        500.unverified.orbax-checkpoint-tmp/    orbax has not finished yet
        300.deleting/                           no longer kept
        quarantine/200.0/  reasons.jsonl        failed verification: kept for a person to look at, never used
        .lock                                   held by the process that writes

A plain number is therefore always a complete step, and whatever a killed process leaves has a suffix.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

from absl import logging

from vlm.errors import UserError
from vlm.manifest import fsync_directory, verify_manifest

QUARANTINE = "quarantine"
UNVERIFIED = ".unverified"
_LEFTOVER = re.compile(r"\d+(\.unverified|\.deleting)?(\.orbax-checkpoint-tmp.*)?")


def step_numbers(directory: Path) -> list[int]:
    """The steps in a checkpoints folder, oldest first, complete by name; their content is not checked."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d{0,17}", name))


def remove_leftovers(directory: Path) -> list[str]:
    """Deletes what killed processes left of unfinished saves and deletions; returns the names."""
    removed = []
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.name.isdigit() and _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def commit(directory: Path, step: int) -> None:
    """Makes the finished `<step>.unverified` the step; a step of that number is set aside first."""
    target = directory / str(step)
    if target.exists():
        quarantine(directory, step, "superseded by a later save of the same step with other values")
    os.rename(directory / f"{step}{UNVERIFIED}", target)
    fsync_directory(directory)


def quarantine(directory: Path, step: int, reason: str) -> None:
    """Renames a step into the quarantine folder, notes the reason there and logs it."""
    folder = directory / QUARANTINE
    folder.mkdir(exist_ok=True)
    number = 0
    while (target := folder / f"{step}.{number}").exists():
        number += 1
    os.rename(directory / str(step), target)
    line = {"step": step, "moved_to": target.name, "reason": reason, "time": round(time.time())}
    with (folder / "reasons.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)
    logging.warning("checkpoint step %d set aside as %s: %s", step, target, reason)


def quarantined(directory: Path) -> list[str]:
    """Names of the steps in the quarantine folder."""
    folder = directory / QUARANTINE
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def apply_retention(
    directory: Path, keep: int, keep_every: int | None, verified: dict[str, bool], fresh: int | None = None
) -> list[int]:
    """Deletes steps that are neither among the newest `keep` sound ones nor multiples of `keep_every`.

    Nothing is deleted until `keep` (at least 2) newer steps have every file there with its SHA-256: a damaged one
    does not count. Steps with files missing or of another size are never deleted, only quarantined on restoring.

    Args:
        directory: the checkpoints folder.
        keep, keep_every: see `Checkpoints`.
        verified: what this process found out before, by the manifest's digest; added to, so a step is hashed once.
        fresh: the step whose manifest was made from its files a moment ago. It is hashed next time instead: then the
            bytes come from the disk rather than from memory, and damage in between is noticed.

    Returns:
        The deleted steps, oldest first.
    """
    keep, kept = max(keep, 2), 0
    doomed = []
    candidates = [step for step in step_numbers(directory) if _manifest_digest(directory / str(step))]
    if len(candidates) <= keep:
        return []
    for step in reversed(candidates):
        if kept == keep:
            doomed.append(step)
        else:
            kept += step == fresh or _is_intact(directory / str(step), verified)
    deleted = []
    for step in reversed(doomed):
        if keep_every and step % keep_every == 0:
            continue
        grave = directory / f"{step}.deleting"
        os.rename(directory / str(step), grave)  # first: a kill during the deletion leaves no half step
        shutil.rmtree(grave)
        deleted.append(step)
    return deleted


def _manifest_digest(path: Path) -> str | None:
    """The digest of a step's manifest when every file is there in its size."""
    try:
        return verify_manifest(path, "fast")["sha256"]
    except (UserError, OSError):
        return None


def _is_intact(path: Path, verified: dict[str, bool]) -> bool:
    digest = _manifest_digest(path)
    if digest is None:
        return False
    if digest not in verified:
        try:
            verify_manifest(path, "full")
        except OSError:  # not the step's fault, perhaps: asked again next time
            return False
        except UserError as error:
            logging.warning("%s is damaged and does not count as kept, so older steps stay: %s", path, error)
            verified[digest] = False
        else:
            verified[digest] = True
    return verified[digest]


class WriterLock:
    """One process writes a checkpoints folder; the lock ends with the process, however it ends.

    A POSIX record lock: forked children do not inherit it, so an orphaned data worker cannot hold it.
    """

    def __init__(self, directory: Path):
        self._path = directory / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Returns whether this process has the lock now.

        Raises:
            UserError: the file system has no locks.
        """
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):  # the two answers of POSIX for a lock that is held
                return False
            raise UserError(f"cannot lock {self._path}: {error.strerror}") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor
        return True

    def require(self) -> None:
        """Raises `UserError` naming the process that holds the lock, when this one cannot have it."""
        if not self.acquire():
            owner = self._path.read_text().strip() or "unknown"
            raise UserError(f"{self._path.parent} is being written by process {owner}: one run per workdir")

    def release(self) -> None:
        """Lets another process write."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
