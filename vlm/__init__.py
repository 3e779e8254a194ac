"""Vision-language pretraining in JAX: AltCLIP, BLIP and FLAVA on one foundation.

Shapes in docstrings and annotations use one legend:

    B batch      L query length   M key length    N images per example   P patches
    H heads      K kv heads       D head width    E hidden width         V vocabulary

Importing the package imports no jax: `load`, `save` and the sub-packages are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.generation import generate
    from vlm.loading import load, load_extra, save

__version__ = "0.1.0"
__all__ = ["generate", "load", "load_extra", "save"]

_LAZY = {"generate": "vlm.generation", "load": "vlm.loading", "load_extra": "vlm.loading", "save": "vlm.loading"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
