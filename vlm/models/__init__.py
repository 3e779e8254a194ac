"""The model families."""

from __future__ import annotations

import importlib

from vlm.errors import UserError, did_you_mean
from vlm.family import Family

FAMILIES = {"altclip": "vlm.models.altclip", "blip": "vlm.models.blip", "flava": "vlm.models.flava"}
"""Where each family's `FAMILY` is defined; a family's code is imported when it is asked for."""


def get_family(name: str) -> Family:
    """Returns a family by name.

    Raises:
      UserError: no such family.
    """
    if name not in FAMILIES:
        raise UserError(f"config.family: expected a known family, found {name!r}{did_you_mean(name, FAMILIES)}")
    return importlib.import_module(FAMILIES[name]).FAMILY
