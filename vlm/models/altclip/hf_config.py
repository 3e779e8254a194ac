"""Architecture of AltCLIP and CLIP checkpoints: from Hugging Face's and OpenCLIP's JSON, or from tensor shapes alone.

Unknown keys are ignored. A class default stands in for a missing key, and `text_config_dict`/`vision_config_dict`
take precedence over `text_config`/`vision_config` exactly as in transformers (they are completed with the class
defaults first, so a value that only `text_config` holds is overridden too).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm.convert.hf_json import Json, activation, check_numbers, mapping, merged, override, square
from vlm.convert.views import TensorView
from vlm.encoders.bert import BertConfig
from vlm.encoders.clip_text import ClipTextConfig
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.models.altclip.model import AltCLIPConfig
from vlm.strict import build

Views = Mapping[str, TensorView]

_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
_CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_ALTCLIP_TEXT = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 514,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
    "type_vocab_size": 1,
    "project_dim": 768,
}
_BERT_TEXT = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "type_vocab_size": 2,
    "project_dim": 512,
}
_XLMR_TEXT = _BERT_TEXT | {"pad_token_id": 1}
_TEXT = {"bert": _BERT_TEXT, "xlm-roberta": _XLMR_TEXT, "roberta": _XLMR_TEXT, "clip_text_model": _CLIP_TEXT}
_HEAD_DIM = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, -g and -bigG; every other published CLIP width has heads of 64


def architecture(config: Json | None, views: Views, notes: list[str], **overrides: Any) -> AltCLIPConfig:
    """Returns the architecture of a checkpoint whose tensors, under our paths, are `views`.

    Which towers, norms and projections exist follows from the tensors. Sizes follow from `config` where there is one
    (a disagreement with the tensors is reported by the import), else from the tensors' shapes.

    Args:
        config: the parsed config.json or open_clip_config.json, or None.
        notes: receives a line for everything a reader of the result should know (assumptions, precedence, warnings).
        overrides: "vision.activation": value pairs, applied last.

    Raises:
        UserError: a value of a wrong type, an unknown activation, non-square images, an override that does not exist.
    """
    parts: dict[str, Any] = {"vision": None, "text": None, "clip_text": None}
    open_clip = config is not None and "model_cfg" in config
    if "vision/patch_embedding/kernel" in views:
        section = None if open_clip or config is None else _section(config, "vision", _VISION, notes)
        section = section or _open_clip_vision(config or {}, infer_vision(views), notes)
        parts["vision"] = _vision(section, views)
        if parts["vision"]["hidden_size"] == 1280 and parts["vision"]["activation"] == "quick_gelu":
            notes.append(
                "vision.activation is quick_gelu as configured, but this ViT-H/14 was first trained with gelu: "
                "--override=vision.activation=gelu switches"
            )
    text = None
    if "text/token_type_embedding/embedding" in views:
        text = _text_section(config, views, notes)
        parts["text"] = _bert(text, views)
    elif "text/token_embedding/embedding" in views:
        section = None if open_clip or config is None else _section(config, "text", _CLIP_TEXT, notes)
        parts["clip_text"] = _clip_text(section or _open_clip_text(config or {}, infer_text(views), notes))
    return _assemble(parts, config, views, text, overrides)


def _assemble(
    parts: dict[str, Any], config: Json | None, views: Views, text: Json | None, overrides: Mapping[str, Any]
) -> AltCLIPConfig:
    config = config or {}
    projections = [name for name in ("vision_projection/kernel", "text_projection/kernel") if name in views]
    width = views[projections[0]].shape[-1] if projections else None
    whole = config if "text_config" in config or "vision_config" in config else {}
    parts["projection_dim"] = whole.get("projection_dim", width) if projections else None
    head = views.get("text_transformation/kernel")
    if head is not None:
        parts["project_dim"] = (text or {}).get("project_dim", head.shape[-1])
    elif "text_projection/kernel" in views:
        parts["project_dim"] = views["text_projection/kernel"].shape[0]
    if isinstance(whole.get("logit_scale_init_value"), int | float):
        parts["logit_scale_init"] = whole["logit_scale_init_value"]
    for name in ("text_norm", "text_transformation", "text_transformation_pre", "lm_head"):
        parts[name] = any(path.startswith(f"{name}/") for path in views)
    override(parts, overrides)
    types = {"vision": ViTConfig, "text": BertConfig, "clip_text": ClipTextConfig}
    for name, cls in types.items():
        if parts[name] is not None:
            check_numbers(parts[name], f"model.{name}")
            parts[name] = build(cls, parts[name], f"model.{name}")
    return build(AltCLIPConfig, parts, "model")


def _section(config: Json, tower: str, defaults: Json, notes: list[str]) -> dict[str, Any] | None:
    """One tower's settings from a joint or a standalone config.json."""
    if mapping(config, f"{tower}_config") is None and mapping(config, f"{tower}_config_dict") is None:
        return {**defaults, **config} if "hidden_size" in config else None
    return merged(config, tower, defaults, notes)


def _text_section(config: Json | None, views: Views, notes: list[str]) -> dict[str, Any]:
    if config is None:
        rows = views["text/token_type_embedding/embedding"].shape[0]
        section = (_BERT_TEXT if rows == 2 else _ALTCLIP_TEXT) | infer_text(views)
        section["model_type"] = "bert" if rows == 2 else "xlm-roberta"
        del section["project_dim"]
        notes.append(
            f"no config.json: sizes from the tensors, {section['num_attention_heads']} heads of 64, "
            f"norm_eps {section['layer_norm_eps']} and {section['model_type']} positions assumed for the text tower"
        )
        return section
    nested = config.get("text_config") or config.get("text_config_dict") or config
    kind = str(nested.get("model_type", "")) if isinstance(nested, Mapping) else ""
    section = _section(config, "text", _TEXT.get(kind, _ALTCLIP_TEXT), notes)
    if section is None:
        raise UserError("config.json describes no text tower, but the weights have one")
    return {**section, "model_type": kind}


def infer_vision(views: Views) -> dict[str, Any]:
    """A vision tower's settings in HF's words, as far as shapes tell them."""
    rows, width = views["vision/patch_embedding/kernel"].shape
    layers, _, mlp = views["vision/layers/mlp/up/kernel"].shape
    patch = math.isqrt(rows // 3)
    side = math.isqrt(views["vision/position_embedding"].shape[0])  # with or without the class token
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "patch_size": patch}
    heads = width // _HEAD_DIM.get(width, 64) or 1
    return _VISION | sizes | {"num_attention_heads": heads, "image_size": side * patch}


def infer_text(views: Views) -> dict[str, Any]:
    """A text tower's settings in HF's words, as far as shapes tell them."""
    vocab, width = views["text/token_embedding/embedding"].shape
    layers, _, mlp = views["text/layers/mlp/up/kernel"].shape
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    sizes["max_position_embeddings"] = views["text/position_embedding/embedding"].shape[0]
    return sizes | {"num_attention_heads": width // 64 or 1, "eos_token_id": vocab - 1}


def _open_clip_vision(config: Json, section: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    model = config.get("model_cfg") or {}
    given = model.get("vision_cfg") or {}
    if isinstance(given.get("head_width"), int):
        section["num_attention_heads"] = section["hidden_size"] // given["head_width"]
    section["hidden_act"] = "quick_gelu" if model.get("quick_gelu", not model) else "gelu"
    if not model:
        notes.append(
            f"no config file: {section['num_attention_heads']} heads and quick_gelu (as OpenAI's models; most of "
            "OpenCLIP's use gelu) assumed for the vision tower: --override=vision.activation=gelu switches"
        )
    return section


def _open_clip_text(config: Json, section: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    model = config.get("model_cfg") or {}
    heads = (model.get("text_cfg") or {}).get("heads")
    if isinstance(heads, int):
        section["num_attention_heads"] = heads
    act = "quick_gelu" if model.get("quick_gelu", not model) else "gelu"
    if not model:
        notes.append("no config file: heads of 64 and quick_gelu assumed for the text tower (clip_text.activation)")
    return _CLIP_TEXT | section | {"hidden_act": act}


def _vision(section: Json, views: Views) -> dict[str, Any]:
    side = {name: square(section[name], name) for name in ("image_size", "patch_size")}
    return {
        "hidden_size": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": section["num_attention_heads"],
        "mlp_dim": section["intermediate_size"],
        **side,
        "activation": activation(section["hidden_act"]),
        "norm_eps": section["layer_norm_eps"],
        "patch_bias": "vision/patch_embedding/bias" in views,
        "attention_dropout_rate": section["attention_dropout"],
    }


def _bert(section: Json, views: Views) -> dict[str, Any]:
    return {
        "vocab_size": section["vocab_size"],
        "hidden_size": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": section["num_attention_heads"],
        "mlp_dim": section["intermediate_size"],
        "max_length": section["max_position_embeddings"],
        "type_vocab_size": section["type_vocab_size"],
        "pad_id": section["pad_token_id"],
        "positions": "absolute" if section["model_type"] == "bert" else "roberta",
        "activation": activation(section["hidden_act"]),
        "norm_eps": section["layer_norm_eps"],
        "pooler": "text/pooler/kernel" in views,
        "dropout_rate": section["hidden_dropout_prob"],
        "attention_dropout_rate": section["attention_probs_dropout_prob"],
    }


def _clip_text(section: Json) -> dict[str, Any]:
    eos, vocab = section["eos_token_id"], section["vocab_size"]
    return {
        "vocab_size": vocab,
        "hidden_size": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": section["num_attention_heads"],
        "mlp_dim": section["intermediate_size"],
        "max_length": section["max_position_embeddings"],
        "activation": activation(section["hidden_act"]),
        "norm_eps": section["layer_norm_eps"],
        # Files from before 2023 say 2 and mean the highest id, which is the end-of-text token.
        "eos_id": vocab - 1 if eos == 2 or not isinstance(eos, int) or eos >= vocab else eos,
    }
