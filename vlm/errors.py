"""Errors that a user can cause, and how commands report them.

A wrong input ends with one line that names the thing, what was expected and what was found, and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

_OF_THE_FILE = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_OF_THE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(ValueError):
    """A wrong input: the message is one line that a user can act on."""


class Parser(argparse.ArgumentParser):
    """Every command's argument parser: a wrong call is a `UserError`, options are not abbreviated.

    The description, usually a module's docstring, is shown as it is.
    """

    def __init__(self, **options: Any):
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter} | options,
        )

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` in place of printing the usage and exiting."""
        raise UserError(message)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the choice nearest to `name`, or nothing where none is near."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`nearest`, or the short list of choices."""
    choices = sorted(map(str, choices))
    return nearest(name, choices) or (f"; choose from {', '.join(choices)}" if 0 < len(choices) <= 12 else "")


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError`, or a file that cannot be there or be read or written, into one line and exit status 2.

    What standard output cannot encode, such as a file name that is not UTF-8, is written as an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        message = " ".join(str(error).split())
    except OSError as error:
        if not isinstance(error, _OF_THE_FILE) and error.errno not in _OF_THE_PATH:
            raise
        message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
