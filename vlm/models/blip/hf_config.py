"""Architecture of BLIP checkpoints: from Hugging Face's config.json, or from tensor shapes alone.

Unknown keys are ignored; a class default stands in for a missing key, with one exception: the number of heads. The
class default of the text tower, 8, is not what any published model has (12), shapes are the same with either, and
files with the wrong number are in circulation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.convert.hf_json import Json, activation, check_numbers, mapping, override, square
from vlm.convert.views import TensorView
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.fusion.med import MedConfig
from vlm.models.blip.config import BLIPConfig
from vlm.strict import build
from vlm.tokenizers.loading import FILE_NAMES, load

Views = Mapping[str, TensorView]

VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 30522,
    "pad_token_id": 0,
    "sep_token_id": 102,
    "cls_token_id": 101,
    "enc_token_id": 30523,
}
IDS = {"bos_token_id": "bos_id", "sep_token_id": "sep_id", "cls_token_id": "cls_id", "enc_token_id": "enc_id"}
"""Names of the model's own tokens in a text_config; transformers knows the first two and keeps the others."""
TOWERS = {"vision": ("blip_vision_model", "vit", "deit"), "text": ("blip_text_model", "bert")}
"""`model_type` of towers that are saved alone."""
HEAD_DIM = 64
_WIDTH, _WRONG_HEADS = 768, 8


def architecture(
    config: Json | None, views: Views, notes: list[str], *, hf: bool, overrides: Mapping[str, Any]
) -> BLIPConfig:
    """Returns the architecture of a checkpoint whose tensors, under our paths, are `views`.

    Which parts exist follows from the tensors. Sizes follow from `config` where there is one (a disagreement with the
    tensors is reported by the import), else from the tensors' shapes. What shapes do not tell depends on the format:
    the authors' files mean epsilon 1e-6 in the vision tower and dropout 0.1, Hugging Face's 1e-5 and none, and only
    the authors' models write [ENC] over the first token.

    Args:
        config: the parsed config.json, or None; of BERT or ViT, theirs.
        notes: receives a line for everything a reader of the result should know.
        hf: whether the names are Hugging Face's.
        overrides: "text.num_heads": value pairs, applied last.

    Raises:
        UserError: a value of a wrong type, an unknown activation, a head count that nothing tells, non-square images,
            an override that does not exist.
    """
    config = config or {}
    guessed = any(_has(views, name) and f"{name}.num_heads" not in overrides for name in ("vision", "text", "decoder"))
    if hf and not config:
        heads = "heads of 64 and " if guessed else ""
        notes.append(f"no config.json: sizes from the tensors, {heads}transformers' default epsilons assumed")
    if not hf and not config and guessed:
        notes.append(".pth files do not store the number of attention heads: heads of 64 assumed (--override)")
    text, vision = _section(config, "text"), _section(config, "vision")
    parts: dict[str, Any] = {"vision": None, "text": None, "decoder": None}
    if _has(views, "vision"):
        parts["vision"] = _vision(vision, views, notes, hf, overrides)
    for name in ("text", "decoder"):
        if _has(views, name):
            parts[name] = _stack(text, name, views, notes, hf, overrides)
    parts |= _parts(views, config, hf)
    for key, field in (IDS | {"pad_token_id": "pad_id"}).items():
        parts[field] = TEXT[key] if text.get(key) is None else text[key]
    override(parts, overrides)
    for name, kind in (("vision", ViTConfig), ("text", MedConfig), ("decoder", MedConfig)):
        if parts[name] is not None:
            check_numbers(parts[name], f"model.{name}")
            parts[name] = build(kind, parts[name], f"model.{name}")
    return build(BLIPConfig, parts, "model")


def with_tokenizer(config: BLIPConfig, folder: Path, given: Json, overrides: Json) -> BLIPConfig:
    """The architecture with the ids of [CLS], [SEP], [DEC] and [ENC] that the tokenizer in a folder has, if one is.

    Only transformers' files tell the ids beside it, and by default not all.

    Args:
        given: the parsed config.json; overrides: what the user says, which counts in any case.

    Raises:
        UserError: config.json and tokenizer say different ids.
    """
    if config.text is None and config.decoder is None or not any((folder / name).is_file() for name in FILE_NAMES):
        return config
    tokenizer = load(folder)
    found = {"cls_id": tokenizer.bos_id, "sep_id": tokenizer.eos_id}
    found |= {"bos_id": tokenizer.token_id("[DEC]"), "enc_id": tokenizer.token_id("[ENC]")}
    found = {name: number for name, number in found.items() if number is not None and name not in overrides}
    section = _section(given, "text")
    for key, name in IDS.items():
        if name in found and section.get(key) not in (None, found[name]):
            expected = f"expected {found[name]}, as the tokenizer in {folder} has, or --override={name}=N"
            raise UserError(f"config.json: {key}: {expected}; found {section[key]}")
    return dataclasses.replace(config, **found)


def _has(views: Views, part: str) -> bool:
    return any(path.startswith(f"{part}/") for path in views)


def _parts(views: Views, config: Json, hf: bool) -> dict[str, Any]:
    """The parts beside the towers, as the tensors tell."""
    projection, classes = views.get("vision_projection/kernel"), views.get("classifier/out/kernel")
    average, merge = (views.get(f"text/{n}_layers/attention/query/kernel") for n in ("average", "merge"))
    layers = [0 if view is None else view.shape[0] for view in (average, merge)]
    scale = config.get("logit_scale_init_value", 2.6592)
    return {
        "shared_decoder": "text/layers/decoder_attention/query/kernel" in views,
        "projection_dim": None if projection is None else projection.shape[-1],
        "projection_bias": projection is None or "vision_projection/bias" in views,
        "itm": "itm_head/kernel" in views,
        "temperature": 0.07 if "temperature" in views else None,
        "logit_scale_init": scale if "logit_scale" in views else None,
        "num_labels": None if classes is None else classes.shape[-1],
        "num_images": 2 if any(layers) else 1,
        "average_layers": layers[0] if layers[0] != sum(layers) // 2 else None,
        "encoder_token": "cls" if hf else "enc",
        "tied_lm_head": "lm_head/kernel" not in views,
    }


def _section(config: Json, tower: str) -> dict[str, Any]:
    """One tower's settings, of a whole model or of the tower alone; {} where the file does not say."""
    if config.get("model_type") in TOWERS[tower]:
        return dict(config)
    return dict(mapping(config, f"{tower}_config") or {})


def _vision(section: Json, views: Views, notes: list[str], hf: bool, overrides: Json) -> dict[str, Any]:
    rows, width = views["vision/patch_embedding/kernel"].shape
    layers, _, mlp = views["vision/layers/mlp/up/kernel"].shape
    patch = math.isqrt(rows // 3)
    side = math.isqrt(views["vision/position_embedding"].shape[0] - 1)
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    sizes |= {"patch_size": patch, "image_size": side * patch}
    heads = _heads(section, width, "vision", notes, overrides)
    section = {**VISION, **section} if section else VISION | sizes | ({} if hf else {"layer_norm_eps": 1e-6})
    return {
        "hidden_size": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": heads,
        "mlp_dim": section["intermediate_size"],
        "image_size": square(section["image_size"], "image_size"),
        "patch_size": square(section["patch_size"], "patch_size"),
        "activation": activation(section["hidden_act"]),
        "norm_eps": section["layer_norm_eps"],
        "patch_bias": "vision/patch_embedding/bias" in views,
        "input_norm": False,
        # Hugging Face's BlipModel normalises the class token again before it projects it; its projection expects that.
        "output_norm": "twice" if "logit_scale" in views else "all",
        "attention_dropout_rate": section["attention_dropout"],
        "init": "normal",
    }


def _stack(section: Json, name: str, views: Views, notes: list[str], hf: bool, overrides: Json) -> dict[str, Any]:
    vocab, width = views[f"{name}/token_embedding/embedding"].shape
    kinds = [n for n in ("layers", "average_layers", "merge_layers") if f"{name}/{n}/mlp/up/kernel" in views]
    if not kinds:
        raise UserError(f"the checkpoint has {name} embeddings, but no layers")
    mlps = [views[f"{name}/{kind}/mlp/up/kernel"] for kind in kinds]
    keys = [f"{name}/{kinds[0]}/cross_attention{end}/key/kernel" for end in ("", "_0")]
    default = width if _has(views, "vision") else None  # BERT has no cross-attention; elsewhere it is missing
    context = next((views[key].shape[-2] for key in keys if key in views), default)
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": mlps[0].shape[-1]}
    sizes["num_hidden_layers"] = sum(mlp.shape[0] for mlp in mlps)
    sizes["max_position_embeddings"] = views[f"{name}/position_embedding/embedding"].shape[0]
    dropout = {"hidden_dropout_prob": 0.0 if hf else 0.1, "attention_probs_dropout_prob": 0.0 if hf else 0.1}
    heads = _heads(section, width, name, notes, overrides)
    section = {**TEXT, **section} if section else TEXT | sizes | dropout
    return {
        "vocab_size": section["vocab_size"],
        "hidden_size": section["hidden_size"],
        "num_layers": section["num_hidden_layers"],
        "num_heads": heads,
        "mlp_dim": section["intermediate_size"],
        "max_length": section["max_position_embeddings"],
        "context_size": context,
        "pad_id": 0 if section["pad_token_id"] is None else section["pad_token_id"],
        "activation": activation(section["hidden_act"]),
        "norm_eps": section["layer_norm_eps"],
        "dropout_rate": section["hidden_dropout_prob"],
        "attention_dropout_rate": section["attention_probs_dropout_prob"],
        "pooler": f"{name}/pooler/kernel" in views,
    }


def _heads(section: Json, width: int, name: str, notes: list[str], overrides: Json) -> Any:
    """The number of attention heads: what the file says, unless it says nothing or the known mistake."""
    given, key = section.get("num_attention_heads"), f"{name}.num_heads"
    if key in overrides:
        return overrides[key]
    wrong = given == _WRONG_HEADS and width == _WIDTH and name != "vision"
    if given is not None and not wrong:
        return given
    if width % HEAD_DIM:
        raise UserError(
            f"{name}: nothing tells the number of attention heads of width {width}, and shapes are the same with any: "
            f"give --override={key}=N"
        )
    heads = width // HEAD_DIM
    if section:
        found = "is missing" if given is None else f"is {given}, transformers' default"
        notes.append(
            f"warning: config.json: {name}: num_attention_heads {found}; heads of {HEAD_DIM} as in every published "
            f"model, so {heads}, are used (--override={key}=N for another number)"
        )
    return heads
