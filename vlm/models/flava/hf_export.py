"""The config.json with which transformers loads an exported FLAVA model, whole or one part of it."""

from __future__ import annotations

from typing import Any

from vlm.convert.hf_json import TO_HF
from vlm.errors import UserError
from vlm.models.flava.config import FLAVAConfig

_ALONE = {
    "vision": "FlavaImageModel",
    "text": "FlavaTextModel",
    "fusion": "FlavaMultimodalModel",
    "codebook": "FlavaImageCodebook",
}


def hf_class(config: FLAVAConfig) -> str:
    """The transformers class that holds these parameters.

    Raises:
        UserError: there is none.
    """
    present = [part for part in _ALONE if getattr(config, part) is not None]
    if config.classifier is not None:
        raise UserError("transformers has no FLAVA class with a classifier; leave it out: --drop='classifier/.*'")
    _check(config)
    projected = config.projection_dim is not None
    if len(present) == 1 and not projected and not config.heads:
        return _ALONE[present[0]]
    if present[:3] == ["vision", "text", "fusion"] and projected:
        if config.heads:
            return "FlavaForPreTraining"
        if config.codebook is None:
            return "FlavaModel"
        raise UserError("transformers has no FLAVA class with a codebook, but no heads: try --drop='codebook/.*'")
    raise UserError(
        "transformers has no FLAVA class with this combination of parts; one encoder alone, e.g. the text encoder: "
        "--drop='(?!text/).*'"
    )


def _check(config: FLAVAConfig) -> None:
    """Refuses what transformers' classes cannot express."""
    encoders = {part: getattr(config, part) for part in ("vision", "text", "fusion") if getattr(config, part)}
    for part, encoder in encoders.items():
        if not encoder.pooler:
            raise UserError(f"transformers' FLAVA needs a pooler in every encoder: {part} has none")
    widths = {part: encoder.hidden_size for part, encoder in encoders.items()}
    if config.heads and len(set(widths.values())) > 1:
        found = ", ".join(f"{part} {width}" for part, width in widths.items())
        raise UserError(f"FlavaForPreTraining needs encoders of one width, found {found}")
    if config.codebook is not None and config.codebook.num_groups != 4:
        raise UserError(f"transformers' codebook has 4 groups, found {config.codebook.num_groups}")


def differences(config: FLAVAConfig) -> list[str]:
    """What transformers computes differently with these parameters, in words."""
    found = []
    if config.fusion is not None and config.vision is not None and not config.mask_text_padding:
        found.append(
            "transformers leaves padding out of the fusion; this model attends to it (mask_text_padding=False)"
        )
    own = {tower.norm_eps for tower in (config.vision, config.text) if tower is not None}
    if config.heads and config.head_norm_eps is not None and own != {config.head_norm_eps}:
        eps = ", ".join(str(value) for value in sorted(own))
        found.append(f"transformers' heads have the encoders' epsilon {eps}; this model's have {config.head_norm_eps}")
    return found


def to_hf(config: FLAVAConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers needs for this architecture."""
    name = hf_class(config)
    common = {"architectures": [name], "dtype": dtype}
    sections = {
        "image_config": _image(config),
        "text_config": _text(config),
        "multimodal_config": _multimodal(config),
        "image_codebook_config": _codebook(config),
    }
    sections = {key: section for key, section in sections.items() if section is not None}
    if name in _ALONE.values():
        return next(iter(sections.values())) | common
    assert config.fusion is not None
    return {
        "model_type": "flava",
        "hidden_size": config.fusion.hidden_size,
        "layer_norm_eps": config.fusion.norm_eps,
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "init_codebook": config.codebook is not None,
        "initializer_factor": 1.0,
        "tie_word_embeddings": True,  # ties the two names of each head's bias
        **common,
        **sections,
    }


def _encoder(encoder: Any, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": encoder.hidden_size,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": encoder.mlp_dim,
        "hidden_act": TO_HF[encoder.activation],
        "hidden_dropout_prob": encoder.dropout_rate,
        "attention_probs_dropout_prob": encoder.attention_dropout_rate,
        "layer_norm_eps": encoder.norm_eps,
        "qkv_bias": encoder.qkv_bias,
    }


def _image(config: FLAVAConfig) -> dict[str, Any] | None:
    if config.vision is None:
        return None
    return _encoder(config.vision, "flava_image_model") | {
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        "num_channels": 3,
        "mask_token": config.vision.mask_token,
        "vocab_size": config.image_vocab_size,
    }


def _text(config: FLAVAConfig) -> dict[str, Any] | None:
    if config.text is None:
        return None
    return _encoder(config.text, "flava_text_model") | {
        "vocab_size": config.text.vocab_size,
        "type_vocab_size": config.text.type_vocab_size,
        "max_position_embeddings": config.text.max_length,
        "pad_token_id": config.text.pad_id,
    }


def _multimodal(config: FLAVAConfig) -> dict[str, Any] | None:
    if config.fusion is None:
        return None
    return _encoder(config.fusion, "flava_multimodal_model") | {"use_cls_token": config.fusion.class_token}


def _codebook(config: FLAVAConfig) -> dict[str, Any] | None:
    if config.codebook is None:
        return None
    return {
        "model_type": "flava_image_codebook",
        "num_groups": config.codebook.num_groups,
        "num_blocks_per_group": config.codebook.blocks_per_group,
        "input_channels": config.codebook.input_channels,
        "hidden_size": config.codebook.hidden_size,
        "vocab_size": config.codebook.vocab_size,
    }
