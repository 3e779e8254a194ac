"""Checks checkpoints without training: `python -m vlm.checkpoint verify PATH`.

PATH is a step directory, a checkpoints folder, a training workdir or a model folder. One line per step; the last
line is a JSON object. Exit status 0 when everything is sound, 2 otherwise. Nothing is renamed or deleted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vlm.errors import Parser, UserError, exit_on_user_error
from vlm.manifest import MANIFEST_NAME, read_manifest, verify_manifest


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = Parser(prog="python -m vlm.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check files and values of every step")
    verify.add_argument("path", type=Path)
    with exit_on_user_error():
        options = parser.parse_args(arguments)
        results = verify_all(options.path)
        print(json.dumps({"path": str(options.path), "ok": not any(results.values()), "problems": results}))
        return 2 if any(results.values()) else 0


def verify_all(path: Path) -> dict[str, str | None]:
    """Checks everything under a path, printing a line for each; {name: the problem or None}.

    Raises:
        UserError: there is nothing to check.
    """
    targets = _targets(path)
    results: dict[str, str | None] = {}
    for target in targets:
        try:
            detail = _verify(target)
        except UserError as error:
            results[target.name] = str(error)
            print(f"{target}: BAD: {error}", flush=True)
        else:
            results[target.name] = None
            print(f"{target}: ok, {detail}", flush=True)
    return results


def _verify(path: Path) -> str:
    try:
        is_step = "leaves" in read_manifest(path)["extra"]
        manifest: dict[str, Any] = verify_manifest(path, "fast" if is_step else "full")
        if is_step:
            from vlm.checkpoint.reading import verify_step

            verify_step(path)
    except UserError:
        raise
    except Exception as error:  # orbax's complaint about a file whose checksum fits
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    size = sum(file["size"] for file in manifest["files"].values())
    leaves = f", {len(manifest['extra']['leaves'])} leaves" if is_step else ""
    return f"{len(manifest['files'])} files{leaves}, {size / 2**20:.1f} MiB"


def _targets(path: Path) -> list[Path]:
    from vlm.checkpoint.steps import step_numbers

    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if (path / MANIFEST_NAME).is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [folder / str(step) for step in step_numbers(folder)]
    if not found:
        raise UserError(f"{path}: no checkpoint and no {MANIFEST_NAME} in it")
    return found


if __name__ == "__main__":
    sys.exit(main())
