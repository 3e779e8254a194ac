"""Architecture of FLAVA checkpoints: from Hugging Face's config.json, or from tensor shapes alone.

Unknown keys are ignored and a class default stands in for a missing key, as in transformers. So does what its old
configurations do: a `text_config_dict`, even an empty one, replaces what `text_config` says by class defaults.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vlm.convert.hf_json import Json, activation, check_numbers, merged, override, square
from vlm.convert.views import TensorView
from vlm.encoders.bert import BertConfig
from vlm.encoders.dvae import DVAEConfig
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.fusion.multimodal import FusionConfig
from vlm.models.flava.config import ClassifierConfig, FLAVAConfig
from vlm.models.flava.layouts import HEADS, ORIGINAL, TMM, codebook_size
from vlm.strict import build

Views = Mapping[str, TensorView]

_ENCODER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
_SECTIONS = {
    "vision": (
        "image",
        "flava_image_model",
        _ENCODER | {"image_size": 224, "patch_size": 16, "mask_token": True, "vocab_size": 8192},
    ),
    "text": (
        "text",
        "flava_text_model",
        _ENCODER | {"vocab_size": 30522, "type_vocab_size": 2, "max_position_embeddings": 512, "pad_token_id": 0},
    ),
    "fusion": (
        "multimodal",
        "flava_multimodal_model",
        _ENCODER | {"num_hidden_layers": 6, "use_cls_token": True},
    ),
    "codebook": (
        "image_codebook",
        "flava_image_codebook",
        {"num_groups": 4, "num_blocks_per_group": 2, "input_channels": 3, "hidden_size": 256, "vocab_size": 8192},
    ),
}
"""Our part -> the beginning of its key in config.json, its model_type, and its class defaults."""
HF_MODEL_TYPES = ("flava", *(kind for _, kind, _ in _SECTIONS.values()))
_HEAD_DIM = 64
_HEADS = {1280: 16, 1408: 16, 1664: 16, 2048: 16}  # torchmultimodal's larger configurations
_TMM_HEAD_EPS = 1e-5


def architecture(
    config: Json | None, views: Views, notes: list[str], *, layout: str, overrides: Mapping[str, Any]
) -> FLAVAConfig:
    """Returns the architecture of a checkpoint whose tensors, under our paths, are `views`.

    Which parts exist follows from the tensors. Sizes follow from `config` where there is one (a disagreement with the
    tensors is reported by the import), else from the tensors' shapes, which are the same with any number of heads.

    Args:
        config: the parsed config.json of Hugging Face, or None.
        notes: receives a line for everything a reader of the result should know.
        layout: where the tensors are from, see `layouts`.
        overrides: "text.num_heads": value pairs, applied last.

    Raises:
        UserError: a value of a wrong type, an unknown activation, a head count that nothing tells, non-square images,
            an override that does not exist.
    """
    sections: dict[str, Any] = {part: None for part in _SECTIONS}
    for part in (part for part in _SECTIONS if _has(views, part)):
        sections[part] = _given(config, part, notes) if config else _SECTIONS[part][2] | _infer(part, views)
    if not config:
        encoders = [part for part in ("vision", "text", "fusion") if sections[part] is not None]
        for part in encoders:
            sections[part]["num_attention_heads"] = _heads(sections[part]["hidden_size"], part, overrides)
        if encoders:
            counts = ", ".join(f"{part}.num_heads={sections[part]['num_attention_heads']}" for part in encoders)
            notes.append(f"no config.json: sizes from the tensors; they do not tell the heads: {counts} (--override)")
    builders = {"vision": _vision, "text": _text, "fusion": _fusion, "codebook": _codebook}
    parts: dict[str, Any] = {
        part: None if section is None else builders[part](section, views) for part, section in sections.items()
    }
    parts |= _parts(views, config or {}, sections)
    if layout == TMM:
        parts |= {"mask_text_padding": False, "head_norm_eps": _TMM_HEAD_EPS if parts["heads"] else None}
    if layout == ORIGINAL and parts["fusion"] is not None:
        notes.append("padding is left out of the fusion (--override=mask_text_padding=False attends to it)")
    parts["classifier"] = _classifier(views, notes, overrides)
    override(parts, overrides)
    kinds = {"vision": ViTConfig, "text": BertConfig, "fusion": FusionConfig, "codebook": DVAEConfig}
    for name, kind in (kinds | {"classifier": ClassifierConfig}).items():
        if parts[name] is not None:
            check_numbers(parts[name], f"model.{name}")
            parts[name] = build(kind, parts[name], f"model.{name}")
    return build(FLAVAConfig, parts, "model")


def _has(views: Views, part: str) -> bool:
    return any(path.startswith(f"{part}/") for path in views)


def _given(config: Json, part: str, notes: list[str]) -> dict[str, Any]:
    """One part's settings from a config.json of the whole model, or of that part alone."""
    name, kind, defaults = _SECTIONS[part]
    if config.get("model_type") == kind:
        return {**defaults, **config}
    return merged(config, name, defaults, notes, label="warning: config.json: as in transformers, ")


def _infer(part: str, views: Views) -> dict[str, Any]:
    """One part's sizes in Hugging Face's words, as far as shapes tell them."""
    if part == "codebook":
        *_, channels, width = views["codebook/input/kernel"].shape
        groups, blocks = codebook_size(path.replace("/", ".") for path in views)
        sizes = {"num_groups": groups, "num_blocks_per_group": blocks, "input_channels": channels}
        return sizes | {"hidden_size": width, "vocab_size": views["codebook/out/kernel"].shape[-1]}
    layers, width, mlp = views[f"{part}/layers/mlp/up/kernel"].shape
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp}
    if part == "vision":
        patch = math.isqrt(views["vision/patch_embedding/kernel"].shape[0] // 3)
        side = math.isqrt(views["vision/position_embedding"].shape[0] - 1)
        sizes |= {"patch_size": patch, "image_size": side * patch}
    if part == "text":
        tables = {"vocab_size": "token", "type_vocab_size": "token_type", "max_position_embeddings": "position"}
        sizes |= {key: views[f"text/{name}_embedding/embedding"].shape[0] for key, name in tables.items()}
    return sizes


def _heads(width: int, part: str, overrides: Json) -> Any:
    """The number of attention heads of an encoder of this width, as in every model of FLAVA's authors."""
    key = f"{part}.num_heads"
    if key in overrides:
        return overrides[key]
    if width % _HEAD_DIM:
        raise UserError(
            f"{part}: nothing tells the number of attention heads of width {width}, and shapes are the same with any: "
            f"give --override={key}=N"
        )
    return _HEADS.get(width, width // _HEAD_DIM)


def _encoder(section: Json, part: str, views: Views) -> dict[str, Any]:
    return {
        "hidden_size": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": section["num_attention_heads"],
        "mlp_dim": section["intermediate_size"],
        "activation": activation(section["hidden_act"]),
        "norm_eps": section["layer_norm_eps"],
        "qkv_bias": section["qkv_bias"],
        "pooler": f"{part}/pooler/kernel" in views,
        "dropout_rate": section["hidden_dropout_prob"],
        "attention_dropout_rate": section["attention_probs_dropout_prob"],
    }


def _vision(section: Json, views: Views) -> dict[str, Any]:
    return _encoder(section, "vision", views) | {
        "image_size": square(section["image_size"], "image_size"),
        "patch_size": square(section["patch_size"], "patch_size"),
        "patch_bias": "vision/patch_embedding/bias" in views,
        "input_norm": False,
        "output_norm": "all",
        "mask_token": "vision/mask_embedding" in views,
        "init": "normal",
    }


def _text(section: Json, views: Views) -> dict[str, Any]:
    return _encoder(section, "text", views) | {
        "vocab_size": section["vocab_size"],
        "max_length": section["max_position_embeddings"],
        "type_vocab_size": section["type_vocab_size"],
        "pad_id": 0 if section["pad_token_id"] is None else section["pad_token_id"],
        "positions": "absolute",
        "pre_norm": True,
    }


def _fusion(section: Json, views: Views) -> dict[str, Any]:
    return _encoder(section, "fusion", views) | {"class_token": "fusion/class_embedding" in views}


def _codebook(section: Json, views: Views) -> dict[str, Any]:
    del views
    names = {field.name: field.name for field in dataclasses.fields(DVAEConfig)}
    names["blocks_per_group"] = "num_blocks_per_group"
    return {ours: section[foreign] for ours, foreign in names.items()}


def _parts(views: Views, config: Json, sections: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the encoders, as the tensors tell."""
    projections = [views[f"{n}_projection/kernel"] for n in ("vision", "text") if f"{n}_projection/kernel" in views]
    outputs = [views[f"{head}/kernel"] for head in ("mim_head", "mmm_image_head") if f"{head}/kernel" in views]
    words = [part["vocab_size"] for part in (sections["vision"], sections["codebook"]) if part is not None]
    if outputs and not config:
        words = [outputs[0].shape[-1]]
    elif sections["codebook"] is not None and not outputs:
        words = words[-1:]
    width = config.get("projection_dim", projections[0].shape[-1]) if projections else None
    return {
        "projection_dim": width,
        "logit_scale_init": config.get("logit_scale_init_value", 2.6592),
        "heads": any(f"{head}/kernel" in views for head in HEADS) or "itm_head/out/kernel" in views,
        "image_vocab_size": words[0] if words else 8192,
    }


def _classifier(views: Views, notes: list[str], overrides: Json) -> dict[str, Any] | None:
    """A head of torchmultimodal; which encoder it reads is an argument of its forward pass."""
    if "classifier/out/kernel" not in views:
        return None
    if "classifier.input" not in overrides:
        notes.append("the classifier is taken to read the fusion (--override=classifier.input=text or image)")
    hidden, labels = views["classifier/out/kernel"].shape
    return {"num_labels": labels, "hidden_size": hidden}
