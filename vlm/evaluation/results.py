"""The files of an evaluation: one JSON result, one JSONL file per evaluation, one HTML page; each whole or not there.

results.json                  metrics, confidence intervals, and all that the numbers depend on
results.NAME.jsonl            one line per example of evaluation NAME
results.NAME.results.json     predictions as the data set's own evaluation, and `vlm.score`, read them, where it has one
results.html                  the same for eyes
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.evaluation.evaluator import Result
from vlm.evaluation.page import render

FORMAT_VERSION = 1


def check_output(output: Path) -> None:
    """Finds out before a long evaluation whether its results can be written.

    Raises:
      UserError: not a .json file, or its folder cannot be made or written to.
    """
    if output.suffix != ".json":
        raise UserError(f"--output: expected a name that ends in .json, found {output}")
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder")
    existing = next(folder for folder in (output.parent, *output.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"--output: cannot write to {existing}")


def flat(results: Mapping[str, Result]) -> dict[str, float]:
    """`{"evaluation/metric": value}` of all evaluations; numbers that are undefined are left out."""
    return {
        f"{name}/{key}": value
        for name, result in results.items()
        for key, value in result.metrics.items()
        if math.isfinite(value)
    }


def document(results: Mapping[str, Result], specs: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the JSON result."""
    evaluations = {
        name: {
            "kind": result.kind,
            "metrics": result.metrics,
            "intervals_95": {key: list(pair) for key, pair in result.intervals.items()},
            "n": result.n,
            "unreadable": result.unreadable,
            **result.details,
            "config": specs.get(name),
        }
        for name, result in results.items()
    }
    return {"format_version": FORMAT_VERSION, "metrics": flat(results), **about, "evaluations": evaluations}


def write(output: Path, results: Mapping[str, Result], specs: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes all files, the JSON result last."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with _together() as put:
        for name, result in results.items():
            if result.examples:
                lines = (json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in result.examples)
                put(output.with_name(f"{output.stem}.{name}.jsonl"), "".join(lines))
            if result.official:
                put(output.with_name(f"{output.stem}.{name}.results.json"), _listed(result.official))
        put(output.with_suffix(".html"), render(results, about))
        content = json.dumps(_finite(document(results, specs, about)), indent=2, ensure_ascii=False, allow_nan=False)
        put(output, content + "\n")


def _listed(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


@contextlib.contextmanager
def _together() -> Iterator[Any]:
    """Files written under temporary names get theirs, in order, when all are on the disk; after an error none does."""
    written: list[tuple[Path, Path]] = []

    def put(path: Path, content: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        written.append((temporary, path))
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    try:
        yield put
        for temporary, path in written:
            os.replace(temporary, path)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Undefined numbers as null: JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
