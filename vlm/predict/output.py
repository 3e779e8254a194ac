"""How answers are written: rounded numbers, whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.manifest import write_atomically


def rounded(value: Any) -> float:
    """Six digits after the point."""
    return round(float(value), 6)


def write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    write_atomically(path, content)
