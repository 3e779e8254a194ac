"""Checksums of a directory: one JSON file that names every other file with its size and SHA-256.

Neither safetensors nor orbax notices a flipped bit in tensor data, so every checkpoint and model folder
carries `vlm_manifest.json`. It is written last, after the files it names are durable: a directory without it
is incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from vlm.errors import UserError

MANIFEST_NAME = "vlm_manifest.json"
FORMAT_VERSION = 1
_MAX_MANIFEST_BYTES = 256 * 2**20


def write_manifest(
    directory: str | Path, extra: Mapping[str, Any], *, digests: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Hashes every file under `directory`, makes the files durable and writes the manifest atomically.

    Args:
        directory: the folder to describe; its manifest, when there is one, is replaced.
        extra: JSON values stored beside the file list under "extra" (step, leaf shapes, versions ...).
        digests: SHA-256 hex digests known from writing, by relative path; those files are not read again.

    Returns:
        The manifest: {"format_version", "files": {path: {"size", "sha256"}}, "extra", "sha256"}. The last
        entry is the digest of the others, so that a damaged manifest is noticed as well.

    Raises:
        UserError: a symbolic link or another special file lies in the directory.
    """
    directory = Path(directory)
    digests = digests or {}
    files = {}
    for name, path in _list_files(directory).items():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = digests.get(name) or hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": sha256}
    for folder in {directory, *(path.parent for path in _list_files(directory).values())}:
        fsync_directory(folder)
    manifest = {"format_version": FORMAT_VERSION, "files": files, "extra": dict(extra)}
    manifest["sha256"] = _self_digest(manifest)
    write_atomically(directory / MANIFEST_NAME, json.dumps(manifest, indent=1, allow_nan=False).encode())
    return manifest


def verify_manifest(directory: str | Path, level: Literal["full", "fast"] = "full") -> dict[str, Any]:
    """Checks a directory against its manifest and returns the manifest.

    "full" reads and hashes every file; "fast" compares names and sizes only.

    Raises:
        UserError: naming the file that is missing, unlisted, of another size or of another content, or the
            manifest itself when it is absent or damaged.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    found = _list_files(directory)
    for name in found.keys() - manifest["files"].keys():
        raise UserError(f"{directory / name}: not listed in {MANIFEST_NAME}, so it does not belong here")
    for name, expected in manifest["files"].items():
        if name not in found:
            raise UserError(f"{directory / name}: missing, although {MANIFEST_NAME} lists it")
        size = found[name].stat().st_size
        if size != expected["size"]:
            raise UserError(f"{directory / name}: {size} bytes, expected {expected['size']}: truncated or changed")
    if level == "full":
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
            list(pool.map(lambda name: verify_digest(found[name], manifest["files"][name]["sha256"]), found))
    return manifest


def verify_digest(path: str | Path, sha256: str) -> None:
    """Raises `UserError` naming the file when its content does not have this SHA-256 hex digest."""
    with Path(path).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{path}: corrupted, SHA-256 is {found[:12]}..., expected {sha256[:12]}...")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Reads the manifest of a directory and checks it against its own digest, but not the files it names."""
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{path}: missing, so the directory is incomplete or was not written by vlm")
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise UserError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["sha256"] == _self_digest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: corrupted, not a manifest") from None
    if not intact:
        raise UserError(f"{path}: corrupted, it does not match its own digest")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: format version {manifest['format_version']}, expected {FORMAT_VERSION}")
    return manifest


def content_digest(path: str | Path) -> str:
    """SHA-256 that tells one checkpoint's content from another's, whatever its path.

    Of a folder with a manifest that of the manifest, which names the content of every file; of another folder or a file
    all of it is read.

    Raises:
        UserError: see `read_manifest`; there is no such file or folder.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return read_manifest(path)["sha256"]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    files = {path.name: path} if path.is_file() else {p.relative_to(path).as_posix(): p for p in path.rglob("*")}
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(f"{len(name)} {name} {hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a small file so that after a crash either the old or the whole new content is there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: str | Path) -> None:
    """Makes renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list_files(directory: Path) -> dict[str, Path]:
    """Returns every regular file below a directory by relative path, except the manifest, in sorted order."""
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory")
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: a link or special file; a checkpoint holds regular files only")
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            files[name] = path
    return files


def _self_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
