"""AltCLIP's tables: every published layout of its checkpoints, and of the XLM-R and CLIP models it is made from.

Read: Hugging Face 4.x and 5.x files, whole or one tower; the authors' FlagAI files (also with a BERT student);
AltDiffusion's text encoders; XLM-R; CLIP from Hugging Face, OpenAI and OpenCLIP. Written: what transformers loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm.convert.blocks import bert, clip_text, clip_vit, linear, norm, open_clip_text, open_clip_vit, roberta_lm_head
from vlm.convert.layouts import Imported, Layout, detect
from vlm.convert.rules import Rule, export_tensors, import_tensors, prefixed
from vlm.convert.transforms import SCALAR, TRANSPOSE
from vlm.convert.views import TensorView, from_array
from vlm.errors import UserError
from vlm.models.altclip.hf_config import architecture
from vlm.models.altclip.hf_export import hf_class, to_hf
from vlm.models.altclip.model import AltCLIPConfig

Shapes = Callable[[AltCLIPConfig], Mapping[str, Any]]
HF_MODEL_TYPES = (
    "altclip",
    "altclip_text_model",
    "altclip_vision_model",
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "xlm-roberta",
)

_SCALE = Rule("logit_scale", "logit_scale", SCALAR)
_PROJECTIONS = (
    Rule("visual_projection.weight", "vision_projection/kernel", TRANSPOSE),
    Rule("text_projection.weight", "text_projection/kernel", TRANSPOSE),
)


def _text_tower(prefix: str, encoder: str, layers: str = "(layer|layers)") -> tuple[Rule, ...]:
    """AltCLIP's text tower: `encoder` ("roberta", "bert") and the head beside it; `layers` as in `blocks.bert`."""
    embedding = "text/token_embedding/embedding"
    return (
        *prefixed(bert(layers=layers), f"{prefix}{encoder}.", "text/"),
        *norm(f"{prefix}pre_LN", "text_norm"),
        *linear(f"{prefix}transformation", "text_transformation"),
        *linear(f"{prefix}transformation_pre", "text_transformation_pre"),
        *roberta_lm_head(f"{prefix}lm_head", "lm_head", embedding),
        Rule(f"{prefix}pooler.*", None),
        Rule(f"{prefix}encoder_tfm.*", None),  # an option of FlagAI's training code that its forward pass never uses
    )


def _joint(encoder: str) -> tuple[Rule, ...]:
    vision = prefixed(clip_vit(), "vision_model.", "vision/")
    return (_SCALE, *_text_tower("text_model.", encoder), *vision, *_PROJECTIONS)


_VISION = (*prefixed(clip_vit(), "(vision_model.|)", "vision/"), _PROJECTIONS[0])
_TEXT = (*_text_tower("", "roberta"), Rule("logit_scale", None))
_XLMR = (
    *prefixed(bert(), "(roberta.|)", "text/"),
    *roberta_lm_head("lm_head", "lm_head", "text/token_embedding/embedding"),
)
_CLIP = (
    _SCALE,
    *prefixed(clip_text(), "(text_model.|)", "text/"),
    *prefixed(clip_vit(), "vision_model.", "vision/"),
    *_PROJECTIONS,
)
_OPEN_CLIP = (
    _SCALE,
    *prefixed(open_clip_vit(), "visual.", "vision/"),
    Rule("visual.proj", "vision_projection/kernel"),
    *prefixed(open_clip_text(), "(|text.)", "text/"),
    Rule("(|text.)text_projection", "text_projection/kernel"),
    Rule("(input_resolution|context_length|vocab_size)", None),
)

LAYOUTS = (
    Layout("AltCLIP (Hugging Face, FlagAI)", (r"text_model\.roberta\.",), _joint("roberta")),
    Layout("AltCLIP with a BERT student (FlagAI)", (r"text_model\.bert\.",), _joint("bert")),
    Layout("AltCLIP or AltDiffusion text tower", (r"roberta\.", r"transformation\.weight"), _TEXT),
    Layout("CLIP (Hugging Face)", (r"(text_model\.)?embeddings\.token_embedding",), _CLIP),
    Layout("CLIP (OpenAI, OpenCLIP)", (r"visual\.conv1\.weight", r"visual\.transformer\."), _OPEN_CLIP),
    Layout("CLIP vision tower (Hugging Face)", (r"(vision_model\.)?encoder\.layers?\.0\.self_attn\.q_proj",), _VISION),
    Layout(
        "XLM-R",
        (
            r".*word_embeddings\.weight",
            r".*\.token_type_embeddings",
            r"(roberta\.)?encoder\.layers?\.0\.attention\.self\.",
        ),
        _XLMR,
    ),
)


def read(
    tensors: Mapping[str, TensorView],
    config: Mapping[str, Any] | None,
    *,
    source: str,
    shapes: Shapes,
    overrides: Mapping[str, Any] | None = None,
) -> Imported:
    """Maps the tensors of any known layout to parameters.

    Args:
        tensors: the foreign tensors by name.
        config: the parsed config.json (or open_clip_config.json) beside them, or None: sizes then follow from shapes.
        source: names the checkpoint in errors.
        shapes: (architecture) -> anything with a `shape` by parameter path, for every parameter that it has.
        overrides: architecture values to change, e.g. {"vision.activation": "gelu"}.

    Raises:
        UserError: unknown layout; or names, shapes and the config do not fit one another (all problems listed).
    """
    layout = detect(LAYOUTS, tensors, source)
    notes: list[str] = []
    where = f"{source} ({layout.name})"
    views = import_tensors(tensors, layout.rules, None, source=where)
    architecture_ = architecture(config, views, notes, **(overrides or {}))
    params = import_tensors(tensors, layout.rules, shapes(architecture_), source=where)
    return Imported(architecture_, params, layout.name, notes)


def assemble(text: Imported, vision: Imported, *, shapes: Shapes, seed: int = 0) -> Imported:
    """Builds an AltCLIP to be trained: the text encoder of one model, everything else of a CLIP model.

    The vision tower, both projections and the temperature come from CLIP (the text projection as in stage 1's
    target space), the encoder from `text`; so does the head where `text` has one. What neither has is initialised
    from `seed`: the head's norm to ones and zeros, its linear map to N(0, 0.02) with zero bias.

    Raises:
        UserError: one of them lacks the tower.
    """
    encoder, clip = text.config.text, vision.config
    if encoder is None or clip.vision is None or clip.projection_dim is None:
        lacks = "XLM-R or BERT text encoder" if encoder is None else "vision tower with its projection"
        raise UserError(f"to build AltCLIP: {text.layout if encoder is None else vision.layout} has no {lacks}")
    if "text_projection/kernel" not in vision.params:
        raise UserError(f"to build AltCLIP: {vision.layout} has no text projection; give a whole CLIP model")
    width = vision.params["text_projection/kernel"].shape[0]
    config = dataclasses.replace(
        clip, text=dataclasses.replace(encoder, pooler=False), clip_text=None, project_dim=width, lm_head=False
    )
    config = dataclasses.replace(config, text_norm=True, text_transformation=True, text_transformation_pre=False)
    params = {path: view for path, view in vision.params.items() if not path.startswith("text/")}
    params |= {path: view for path, view in text.params.items() if path.startswith(("text/", "text_"))}
    notes = [*text.notes, *vision.notes]
    rng = np.random.default_rng(seed)
    needed = shapes(config)
    for path in (path for path in needed if path not in params):
        shape = needed[path].shape
        if path.endswith("/kernel"):
            values = rng.normal(0.0, 0.02, shape)
        else:
            values = np.ones(shape) if path.endswith("/scale") else np.zeros(shape)
        params[path] = from_array(values.astype(np.float32))
        notes.append(f"initialised {path} {list(shape)} from seed {seed}: no source has it")
    wrong = [path for path in needed if params[path].shape != needed[path].shape]
    if wrong:
        raise UserError(
            f"to build AltCLIP: {wrong[0]} has shape {params[wrong[0]].shape}, not {needed[wrong[0]].shape}"
        )
    return Imported(config, {path: params[path] for path in needed}, f"{text.layout} + {vision.layout}", notes)


def max_tokens(config: AltCLIPConfig) -> int | None:
    """Longest row of tokens that the text tower takes; None without one."""
    if config.text is not None:
        return config.text.max_tokens
    return None if config.clip_text is None else config.clip_text.max_length


def without(config: AltCLIPConfig, params: Mapping[str, Any]) -> AltCLIPConfig:
    """The architecture that has only the optional parts whose parameters are left."""
    parts = ("text_norm", "text_transformation", "text_transformation_pre", "lm_head")
    kept = {name: any(path.startswith(f"{name}/") for path in params) for name in parts}
    towers = {name: getattr(config, name) for name in ("vision", "text", "clip_text")}
    for name, tower in towers.items():
        prefix = "vision/" if name == "vision" else "text/"
        towers[name] = tower if any(path.startswith(prefix) for path in params) else None
    projected = any(path.endswith("_projection/kernel") for path in params)
    projection_dim = config.projection_dim if projected else None
    return dataclasses.replace(config, **kept, **towers, projection_dim=projection_dim)


def write(
    config: AltCLIPConfig, params: Mapping[str, TensorView], notes: list[str] | None = None
) -> tuple[dict[str, TensorView], dict[str, Any]]:
    """Returns the tensors and the config.json that transformers loads: a joint model's names are those of its
    4.x releases, which 5.x reads too. There is nothing to add to `notes`.

    Raises:
        UserError: no transformers class holds this combination of parts.
    """
    del notes
    name = hf_class(config)
    tables = {
        "AltCLIPModel": _joint("roberta"),
        "AltCLIPTextModel": _text_tower("", "roberta", "(layers|layer)"),  # alone, 5.x reads only this spelling
        "RobertaSeriesModelWithTransformation": _TEXT,
        "CLIPModel": _CLIP,
        "CLIPTextModel": _CLIP,
        "CLIPTextModelWithProjection": _CLIP,
        "AltCLIPVisionModel": _VISION,
        "CLIPVisionModelWithProjection": _VISION,
        "XLMRobertaModel": _XLMR,
        "XLMRobertaForMaskedLM": _XLMR,
    }
    dtypes = {str(view.dtype) for view in params.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return export_tensors(params, tables[name], target=f"export as {name}"), to_hf(config, dtype)
