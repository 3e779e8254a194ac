"""The config.json with which transformers loads an exported AltCLIP or CLIP model, whole or one tower."""

from __future__ import annotations

from typing import Any

from vlm.convert.hf_json import TO_HF
from vlm.errors import UserError
from vlm.models.altclip.model import AltCLIPConfig


def to_hf(config: AltCLIPConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers needs for this architecture (`export_rules` names the tensors alike)."""
    common = {"dtype": dtype, "architectures": [hf_class(config)]}
    vision = None if config.vision is None else _hf_vision(config)
    text = _hf_bert(config) if config.text is not None else None
    text = _hf_clip_text(config) if config.clip_text is not None else text
    if vision is None or text is None:
        return {**(vision or text or {}), **common}
    return {
        **common,
        "model_type": "clip" if config.clip_text is not None else "altclip",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "initializer_factor": 1.0,
        "text_config": text,
        "vision_config": vision,
    }


def hf_class(config: AltCLIPConfig) -> str:
    """The transformers class that holds exactly these parameters.

    Raises:
        UserError: there is none.
    """
    vision, projected = config.vision is not None, config.projection_dim is not None
    headed = config.text_norm and config.text_transformation and not config.lm_head
    if config.text is not None and config.text.positions == "absolute":
        raise UserError("transformers has no AltCLIP class with a BERT text tower")
    if vision and projected and config.clip_text is not None:
        return "CLIPModel"
    if vision and projected and config.text is not None and headed and not config.text_transformation_pre:
        return "AltCLIPModel"
    if vision and config.text is None and config.clip_text is None:
        return "CLIPVisionModelWithProjection" if projected else "AltCLIPVisionModel"
    if not vision and config.clip_text is not None:
        return "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    if not vision and not projected and config.text is not None:
        if config.text_transformation and not config.lm_head:
            plain = config.text_norm and not config.text_transformation_pre
            return "AltCLIPTextModel" if plain else "RobertaSeriesModelWithTransformation"
        if not (config.text_norm or config.text_transformation or config.text_transformation_pre):
            return "XLMRobertaForMaskedLM" if config.lm_head else "XLMRobertaModel"
    raise UserError(
        "no transformers class holds this combination of parts; leave some out, e.g. --drop='lm_head/.*' or "
        "--drop='text_transformation_pre/.*'"
    )


def _hf_vision(config: AltCLIPConfig) -> dict[str, Any]:
    vision = config.vision
    assert vision is not None
    clip = hf_class(config) in ("CLIPModel", "CLIPVisionModelWithProjection")
    return {
        "model_type": "clip_vision_model" if clip else "altclip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": TO_HF[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": vision.attention_dropout_rate,
        "projection_dim": config.projection_dim or 512,
    }


def _hf_clip_text(config: AltCLIPConfig) -> dict[str, Any]:
    text = config.clip_text
    assert text is not None
    return {
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.max_length,
        "hidden_act": TO_HF[text.activation],
        "layer_norm_eps": text.norm_eps,
        "bos_token_id": text.eos_id - 1,
        "eos_token_id": text.eos_id,
        "projection_dim": config.projection_dim or 512,
    }


def _hf_bert(config: AltCLIPConfig) -> dict[str, Any]:
    text, name = config.text, hf_class(config)
    assert text is not None
    kinds = {"RobertaSeriesModelWithTransformation": "xlm-roberta", "XLMRobertaModel": "xlm-roberta"}
    section = {
        "model_type": (kinds | {"XLMRobertaForMaskedLM": "xlm-roberta"}).get(name, "altclip_text_model"),
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.max_length,
        "hidden_act": TO_HF[text.activation],
        "layer_norm_eps": text.norm_eps,
        "type_vocab_size": text.type_vocab_size,
        "pad_token_id": text.pad_id,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_dropout_prob": text.dropout_rate,
        "attention_probs_dropout_prob": text.attention_dropout_rate,
    }
    if config.text_transformation:
        section["project_dim"] = config.project_dim
    if name == "RobertaSeriesModelWithTransformation":
        section |= {"has_pre_transformation": config.text_transformation_pre, "use_attention_mask": True}
    return section
