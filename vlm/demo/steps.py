"""The steps of a demonstration: commands of the checkout, printed, run and timed."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import vlm
from vlm.errors import UserError

ROOT = Path(vlm.__file__).resolve().parents[1]
DEFAULT_OUTPUT = "demo_output"


def check_checkout() -> None:
    """Raises UserError: this is not a checkout with train.py and eval.py."""
    if not (ROOT / "train.py").is_file():
        raise UserError(f"the demonstration runs train.py of a checkout, and {ROOT} has none")


def where(output: Path) -> str:
    """What a configuration's variant is followed by so that it reads from `output`."""
    return "" if str(output) == DEFAULT_OUTPUT and Path.cwd() == ROOT else f",{output.absolute()}"


def python(command: Sequence[str]) -> str:
    """Runs a script of the checkout and returns its standard output.

    Raises:
      UserError: it failed; its own message has gone to standard error.
    """
    say(f"$ python {shlex.join(command)}")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{command[0]} ended with status {done.returncode}, see above")
    return done.stdout


def timed(seconds: dict[str, float], name: str, step: Callable[[], str | None]) -> str:
    """Runs a step and notes its seconds."""
    began = time.monotonic()
    result = step() or ""
    seconds[name] = time.monotonic() - began
    return result


def summary(seconds: dict[str, float]) -> str:
    """The seconds of every step, and together."""
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return f"seconds: {parts}; together {sum(seconds.values()):.0f}"


def shown(path: Path) -> str:
    """A path as the scripts, which run in the checkout, need it."""
    return str(path) if Path.cwd() == ROOT else str(path.absolute())


def say(text: str) -> None:
    """Tells the user."""
    print(text, file=sys.stderr, flush=True)
