"""Training checkpoints: saved in the background, complete or absent, verified before they are used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging as logging_module
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

import vlm
from vlm.checkpoint import leaves as leaf_tables
from vlm.checkpoint import steps
from vlm.checkpoint.fingerprint import fingerprints
from vlm.checkpoint.processes import any_process, from_primary, is_primary
from vlm.checkpoint.reading import check_files, read_arrays, wrong_leaves, wrong_on_disk
from vlm.errors import UserError
from vlm.manifest import read_manifest, verify_manifest, write_manifest
from vlm.tree import listing, unflatten

State = TypeVar("State")


class Checkpoints:
    """The checkpoints of one run, in one folder.

    `save` returns as soon as the state is copied to host memory (later steps may donate its buffers); orbax
    writes it in the background, then come checksums, a manifest, and the rename that makes the step exist. A
    process that dies at any moment leaves the last complete step. `restore` takes the newest step that proves
    to be exactly what was in memory, onto any mesh and any number of processes.

    All processes of a run construct it and call its methods together; as a context it is closed, also by one that
    fails alone.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        verify: Literal["auto", "full", "fast"] = "auto",
    ):
        """Opens the folder, creating it, and removes what killed saves left, unless another process writes there.

        Args:
            directory: usually `workdir/checkpoints`, on a file system that all processes share.
            keep: newest steps to keep; at least 2 are kept whatever it says.
            keep_every: also keep steps that are multiples of this.
            verify: before restoring, "full" hashes every file, "fast" compares sizes; values are compared with
                their fingerprints in any case. "auto": "full" up to 8 GiB.
        """
        if "://" in str(directory):
            raise UserError(f"{directory}: checkpoints need a folder of a mounted file system, not an address")
        self.directory = Path(directory).resolve()
        self._keep, self._keep_every = keep, keep_every
        self._verify: Literal["auto", "full", "fast"] = verify
        self._thread: threading.Thread | None = None
        self._error: tuple[int, BaseException] | None = None
        self._tested = False
        self._verified: dict[str, bool] = {}
        self._lock = steps.WriterLock(self.directory)
        for logger in (logging.get_absl_logger(), logging_module.getLogger("asyncio")):
            logger.addFilter(_ALREADY_RAISED)
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = _without_late_writes
        # Weights hardly compress (7 %), and trying costs more than all verification: see benchmarks/checkpoint.py.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        from_primary(self._open)

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # a read-only folder can still be restored from
            if self._lock.acquire() and (removed := steps.remove_leftovers(self.directory)):
                logging.info("removed unfinished checkpoints: %s", ", ".join(removed))

    def steps(self) -> list[int]:
        """The complete steps, oldest first; their content is not verified."""
        return steps.step_numbers(self.directory)

    def _newest(self) -> int | None:
        return max(self.steps(), default=None)

    # ------------------------------------------------------------------------------------------------------ save

    def save(self, step: int, state: Any, data_state: Mapping[str, Any], config_hash: str, wait: bool = False) -> None:
        """Saves a state; waits for the previous save first. Saving the same values twice does nothing.

        Args:
            step: number of finished steps, the name of the checkpoint.
            state: a pytree of jax arrays, typed PRNG keys included.
            data_state: the data position, JSON values.
            config_hash: identifies the run's configuration.
            wait: return only when the step is durable.

        Raises:
            UserError: the state holds NaN or Inf, a leaf cannot be saved exactly, this or the previous save
                failed (disk full, for instance), or another process writes to the folder.
        """
        self.wait()
        leaves = leaf_tables.named_leaves(state)
        arrays = leaf_tables.stored_arrays(leaves)
        prints = fingerprints(arrays)
        if bad := [name for name in prints if not prints[name].finite]:
            raise UserError(f"step {step} is not saved: NaN or Inf in {len(bad)} leaves of the state: {listing(bad)}")
        extra = {
            "step": int(step),
            "config_hash": config_hash,
            "data_state": _json_values(data_state),
            "leaves": leaf_tables.make_records(leaves, arrays, prints),
            "versions": _versions(),
            "processes": jax.process_count(),
        }
        if from_primary(lambda: self._begin(step, extra)):
            tree = unflatten({name: array for name, array in arrays.items() if array.size})
            target = self.directory / f"{step}{steps.UNVERIFIED}"
            try:
                self._orbax.save(target, args=ocp.args.PyTreeSave(tree))
            except Exception as error:
                self._discard(step)
                raise _failure(step, error, self._newest()) from error
            self._thread = threading.Thread(target=self._finish, args=(step, extra), name=f"checkpoint-{step}")
            self._thread.start()
        if wait:
            self.wait()

    def _begin(self, step: int, extra: dict[str, Any]) -> bool:
        """Completes `extra` with the parent; returns whether there is something to write."""
        self._lock.require()
        self._discard(step)
        with contextlib.suppress(UserError, OSError):
            old = verify_manifest(self.directory / str(step), "fast")["extra"]
            same = ("step", "config_hash", "data_state", "leaves")
            if all(old.get(key) == extra[key] for key in same):
                return False
        extra["parent"] = None
        for parent in reversed([number for number in self.steps() if number < step]):
            with contextlib.suppress(UserError, OSError):
                extra["parent"] = {"step": parent, "sha256": read_manifest(self.directory / str(parent))["sha256"]}
                break
        return True

    def _finish(self, step: int, extra: Mapping[str, Any]) -> None:
        """In the background: orbax's files, the manifest, the step's name, retention."""
        try:
            self._orbax.wait_until_finished()
            if not is_primary():
                return
            path = self.directory / f"{step}{steps.UNVERIFIED}"
            write_manifest(path, extra, digests=_digests(path))
            self._read_back_once(path, extra["leaves"])
            steps.commit(self.directory, step)
            steps.apply_retention(self.directory, self._keep, self._keep_every, self._verified, fresh=step)
        except BaseException as error:
            self._error = (step, error)

    def _read_back_once(self, path: Path, records: leaf_tables.Records) -> None:
        """The first step of a run is read again: a state that can be saved but not restored shows now."""
        if self._tested or jax.process_count() > 1:
            return
        if wrong := wrong_on_disk(path, records):
            raise UserError(f"values on disk differ from those in memory: {listing(wrong)}")
        self._tested = True

    def _discard(self, step: int) -> None:
        """Removes what a failed save has left. Writes that had begun may still end, and put files back meanwhile."""
        for _ in range(20 if is_primary() else 0):
            left = list(self.directory.glob(f"{step}{steps.UNVERIFIED}*"))
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if not left:
                return
            time.sleep(0.1)

    def wait(self) -> None:
        """Blocks until the last save is durable.

        Raises:
            UserError: it failed. The steps before it are untouched.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        failed = any_process(error is not None)
        if error is not None:
            self._discard(error[0])
            raise _failure(*error, self._newest()) from error[1]
        if failed:
            raise UserError("a checkpoint failed in another process; see its message")

    def close(self) -> None:
        """Waits for the last save, then lets another process write.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes. After an error, which may be of this process alone, nothing is asked of the others."""
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._orbax.close()
        self._lock.release()

    # --------------------------------------------------------------------------------------------------- restore

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[State, int, dict[str, Any]] | None:
        """Reads the newest verified step, or the given one.

        A newest step that fails verification is renamed into the quarantine folder with the reason, and the one
        before is tried. A step that is asked for by number is used or refused.

        Args:
            abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves and their shardings, on
                any mesh. None as sharding: the first device.
            step: a step number; None: the newest.

        Returns:
            (state, step, data_state), bit for bit as saved; None when the folder has never held a step.

        Raises:
            UserError: the checkpoint is of another structure, with every difference; the step does not exist or
                is damaged; or every step is damaged.
        """
        self.wait()
        abstract = leaf_tables.named_leaves(abstract_state)
        targets = leaf_tables.stored_targets(abstract)
        while (found := from_primary(lambda: self._choose(step))) is not None:
            chosen, manifest = found
            path = self.directory / str(chosen)
            records = manifest["leaves"]
            leaf_tables.check_structure(str(path), records, abstract)
            arrays = self._read(path, targets, records, quarantine=step is None)
            if arrays is not None:
                restored = [leaf_tables.restored_leaf(arrays[name], records[name]) for name in abstract]
                state = jax.tree.unflatten(jax.tree.structure(abstract_state), restored)
                return state, chosen, manifest["data_state"]
        return None

    def _choose(self, step: int | None) -> tuple[int, dict[str, Any]] | None:
        """The step to restore and what its manifest says, after checking its files."""
        if step is not None:
            if step not in self.steps():
                raise UserError(f"{self.directory}: no step {step}; there are {self.steps() or 'none'}")
            return step, check_files(self.directory / str(step), self._verify)["extra"]
        for candidate in reversed(self.steps()):
            try:
                return candidate, check_files(self.directory / str(candidate), self._verify)["extra"]
            except UserError as error:
                self._lock.require()
                steps.quarantine(self.directory, candidate, str(error))
        if bad := steps.quarantined(self.directory):
            raise UserError(
                f"{self.directory}: every checkpoint failed verification ({listing(bad)} in {steps.QUARANTINE}/, "
                f"see reasons.jsonl there); move {steps.QUARANTINE}/ away to start from the beginning"
            )
        return None

    def _read(
        self, path: Path, targets: Mapping[str, Any], records: leaf_tables.Records, quarantine: bool
    ) -> dict[str, jax.Array] | None:
        """The verified arrays of a step; None when it was damaged and has been set aside."""
        arrays: dict[str, jax.Array] = {}
        failure: Exception | None = None
        try:
            arrays = read_arrays(path, targets)
        except Exception as error:
            failure = error
        failed = any_process(failure is not None)
        wrong = [] if failed else wrong_leaves(arrays, records)
        if not failed and not wrong:
            return arrays
        message = f"{path}: values differ from those that were saved: {listing(wrong)}" if wrong else None
        message = from_primary(lambda: _diagnose(path, message))
        if message is None:  # the files are what was written: memory, permissions …, not the checkpoint
            raise failure or UserError(f"{path}: another process could not read it; see its message")
        if not quarantine:
            raise UserError(message) from failure
        from_primary(lambda: steps.quarantine(self.directory, int(path.name), message))
        return None


def _diagnose(path: Path, message: str | None) -> str | None:
    """The damaged file, where there is one: the best reason to give."""
    try:
        check_files(path, "full")
    except UserError as error:
        return str(error)
    return message


def _failure(step: int, error: BaseException, newest: int | None) -> UserError:
    """One line for a failed save: the system's reason where there is one in a long message of the storage layer."""
    if isinstance(error, UserError):
        reason = str(error)
    else:
        causes = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO))
        first_line = (str(error).strip() or "no message").splitlines()[0]
        reason = next((cause for cause in causes if cause in str(error)), f"{type(error).__name__}: {first_line}")
    kept = "there is no complete step" if newest is None else f"the newest complete step is {newest}"
    return UserError(f"checkpoint of step {step} failed: {reason}; {kept}")


class _AlreadyRaised(logging_module.Filter):
    """Drops log records with tracebacks of orbax's errors: it raises them too, and they are reported once.

    It raises the first of several that failed together, and asyncio logs the others, as never retrieved: those of
    tensorstore have no traceback at all, since no Python code has raised them.
    """

    def filter(self, record: logging_module.LogRecord) -> bool:
        if not record.exc_info:
            return True
        if record.name == "asyncio" and record.exc_info[2] is None:
            return False
        frames = traceback.walk_tb(record.exc_info[2])
        files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
        return not any(f"{os.sep}orbax{os.sep}" in file for file in files)


_ALREADY_RAISED = _AlreadyRaised()


def _without_late_writes(unraisable: Any) -> None:
    """Drops what tensorstore prints, from its threads, of writes that end when the first failed one was raised."""
    if unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed":
        return
    sys.__unraisablehook__(unraisable)


def _json_values(data_state: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(data_state), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint: the data position is not plain JSON: {error}") from None


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file, several at a time: hashlib releases the interpreter."""

    def digest(file: Path) -> tuple[str, str]:
        with file.open("rb") as opened:
            return file.relative_to(path).as_posix(), hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(pool.map(digest, [file for file in path.rglob("*") if file.is_file()]))


def _versions() -> dict[str, str]:
    return {"vlm": vlm.__version__, "jax": jax.__version__, "orbax": ocp.__version__, "numpy": np.__version__}
