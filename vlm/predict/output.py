"""How answers are written: rounded numbers, whole files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm.manifest import write_atomically


def as_flags(message: str, section: str, names: Iterable[str]) -> str:
    """What is wrong with the settings `names` of a configuration's section, in terms of the flags that they came from.

    "config.captions: top_p: expected …" is "--top_p: expected …", and "do_sample=True" is "--do_sample".
    """
    message = message.removeprefix(f"config.{section}").lstrip(".: ").replace("do_sample=False", "without do_sample")
    return re.sub(rf"\b({'|'.join(names)})\b(=True)?", r"--\1", message)


def rounded(value: Any) -> float:
    """Six digits after the point."""
    return round(float(value), 6)


def write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    write_atomically(path, content)
