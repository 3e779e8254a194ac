"""FLAVA's checkpoints, read and written.

Read: Hugging Face's six classes; torchmultimodal's files of every release (pretraining, model, classification); the
original training checkpoint; DALL-E's encoder. Written: what transformers loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from vlm.convert.layouts import Imported, detect
from vlm.convert.rules import export_tensors, import_tensors, sizes_from
from vlm.convert.views import TensorView, cast, from_array
from vlm.errors import UserError
from vlm.models.flava import layouts
from vlm.models.flava.config import FLAVAConfig
from vlm.models.flava.hf_config import HF_MODEL_TYPES, architecture
from vlm.models.flava.hf_export import differences, hf_class, to_hf
from vlm.models.flava.layouts import HEADS, LAYOUTS

__all__ = ["HF_MODEL_TYPES", "LAYOUTS", "Imported", "max_tokens", "read", "without", "write"]

Shapes = Callable[[FLAVAConfig], Mapping[str, Any]]
Views = Mapping[str, TensorView]

_HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_TABLES = {
    "FlavaModel": layouts.HF,
    "FlavaForPreTraining": layouts.HF,
    "FlavaImageModel": layouts.IMAGE,
    "FlavaTextModel": layouts.TEXT,
    "FlavaMultimodalModel": layouts.MULTIMODAL,
    "FlavaImageCodebook": layouts.CODEBOOK,
}


def read(
    tensors: Views,
    config: Mapping[str, Any] | None,
    *,
    source: str,
    shapes: Shapes,
    overrides: Mapping[str, Any] | None = None,
) -> Imported:
    """Maps the tensors of any known layout to parameters.

    Args:
        tensors: the foreign tensors by name.
        config: the parsed config.json beside them (of Hugging Face), or None: sizes then follow from shapes.
        source: names the checkpoint in errors.
        shapes: (architecture) -> anything with a `shape` by parameter path, for every parameter that it has.
        overrides: architecture values to change, e.g. {"text.num_heads": 12}.

    Raises:
        UserError: unknown layout; or names, shapes and the config do not fit one another (all problems listed).
    """
    layout = detect(LAYOUTS, tensors, source).name
    where, notes = f"{source} ({layout})", []
    if layout == layouts.TMM and any(name.startswith("model.model.") for name in tensors):  # Lightning's wrapper
        tensors = {name.removeprefix("model."): view for name, view in tensors.items()}
    if layout in (layouts.ORIGINAL, layouts.DALLE):
        tensors = {n: cast(v, np.dtype(np.float32)) if v.dtype in _HALF else v for n, v in tensors.items()}
    rules = layouts.table(layout, layouts.codebook_size(tensors))
    views = import_tensors(tensors, rules, None, source=where, partial=True)
    given = config if "Hugging Face" in layout else None
    try:
        with sizes_from(tensors, rules, where):
            built = architecture(given, views, notes, layout=layout, overrides=overrides or {})
        target = shapes(built)
        absent = {path for path in ("logit_scale",) if path in target and path not in views}
        needed = {path: leaf for path, leaf in target.items() if path not in absent}
        params = import_tensors(tensors, rules, needed, source=where)
    except UserError as error:  # values that an old configuration reverts are the likely cause
        raise UserError("; ".join([str(error), *(note for note in notes if note.startswith("warning"))])) from None
    for path in absent:
        params[path] = from_array(np.asarray(built.logit_scale_init, np.float32))
        notes.append(f"initialised {path} to {built.logit_scale_init}: the file does not have it")
    return Imported(built, {path: params[path] for path in target}, layout, notes)


def max_tokens(config: FLAVAConfig) -> int | None:
    """Longest row of tokens that the text encoder takes; None without one."""
    return None if config.text is None else config.text.max_tokens


def without(config: FLAVAConfig, params: Mapping[str, Any]) -> FLAVAConfig:
    """The architecture that has only the parts whose parameters are left."""

    def kept(part: str) -> bool:
        return any(path.startswith(f"{part}/") for path in params)

    parts = {n: getattr(config, n) if kept(n) else None for n in ("vision", "text", "fusion", "codebook", "classifier")}
    projected = kept("vision_projection") or kept("text_projection")
    return dataclasses.replace(
        config,
        **parts,
        heads=config.heads and any(kept(head) for head in (*HEADS, "itm_head")),
        projection_dim=config.projection_dim if projected else None,
    )


def write(
    config: FLAVAConfig, params: Views, notes: list[str] | None = None
) -> tuple[dict[str, TensorView], dict[str, Any]]:
    """Returns the tensors and the config.json that transformers loads; `notes` receives what it computes differently.

    Raises:
        UserError: no transformers class holds this combination of parts.
    """
    name = hf_class(config)
    if notes is not None:
        notes += [f"warning: {difference}" for difference in differences(config)]
    size = (4, 2) if config.codebook is None else (config.codebook.num_groups, config.codebook.blocks_per_group)
    rules = layouts.table(_TABLES[name], size, "(|flava.)" if name == "FlavaModel" else "(flava.|)")
    dtypes = {str(view.dtype) for view in params.values()}
    tensors = export_tensors(params, rules, target=f"export as {name}")
    return tensors, to_hf(config, dtypes.pop() if len(dtypes) == 1 else "float32")
