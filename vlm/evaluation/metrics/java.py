"""METEOR and SPICE, which exist as Java programs only: run where Java and the `captions` extra are installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import shutil
import sys
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vlm.errors import UserError

_CLASSES = {"meteor": ("pycocoevalcap.meteor.meteor", "Meteor"), "spice": ("pycocoevalcap.spice.spice", "Spice")}
_SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def missing(name: str) -> str | None:
    """What keeps `meteor` or `spice` from running here, as one line; None when nothing does."""
    if not shutil.which("java"):
        return f"{name} needs Java: no `java` on the PATH"
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or package.origin is None and not package.submodule_search_locations:
        return f"{name} needs the package pycocoevalcap: pip install 'vlm[captions]'"
    folder = pathlib.Path(next(iter(package.submodule_search_locations or ())), "spice", "lib")
    absent = [file for file in _SPICE_FILES if not (folder / file).is_file()]
    if name == "spice" and absent:  # the package would download them
        return f"spice needs {' and '.join(absent)} (Stanford CoreNLP 3.6.0) in {folder}"
    return None


def run(
    name: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, " i"]]:
    """METEOR or SPICE of tokenised captions: of the corpus, and of every image.

    Raises:
      UserError: Java or the package is missing.
    """
    problem = missing(name)
    if problem:
        raise UserError(problem)
    module, cls = _CLASSES[name]
    scorer = getattr(importlib.import_module(module), cls)()
    with contextlib.redirect_stdout(sys.stderr):  # the tool prints; standard output belongs to the result
        total, each = scorer.compute_score(
            {i: list(row) for i, row in enumerate(references)}, {i: [text] for i, text in enumerate(hypotheses)}
        )
    if name == "spice":
        each = [image["All"]["f"] for image in each]
    return float(total), np.asarray(each, np.float64)
