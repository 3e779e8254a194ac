"""The config.json with which transformers loads an exported BLIP model."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlm.convert.hf_json import TO_HF
from vlm.errors import UserError
from vlm.models.blip.config import BLIPConfig


def hf_class(config: BLIPConfig) -> str:
    """The transformers class that holds these parameters.

    Raises:
        UserError: there is none.
    """
    text, decoder = config.text, config.decoder
    if text is None and decoder is None:
        return "BlipVisionModel"
    if config.vision is None:
        if text is None or decoder is not None or text.context_size is None or not text.pooler:
            raise UserError("transformers has no BLIP class for this text stack alone, only for one with its pooler")
        return "BlipTextModel"
    if config.shared_decoder:
        raise UserError(
            "transformers has no class for a pretraining model (shared decoder): choose what it becomes with "
            "--task=caption, --task=retrieval or --task=vqa, or write the authors' format with --to=original"
        )
    if config.num_labels is not None:
        raise UserError("transformers has no BLIP class with a classifier (NLVR2, classification): try --to=original")
    if text is None and decoder is not None:
        return "BlipForConditionalGeneration"
    if text is not None and decoder is not None:
        _check_answering(config)
        return "BlipForQuestionAnswering"
    if config.itm and config.projection_dim is not None and config.projection_bias:
        _check_class_token(config, "BlipForImageTextRetrieval", "all")
        return "BlipForImageTextRetrieval"
    if not config.itm and config.logit_scale_init is not None and text is not None and text.pooler:
        _check_class_token(config, "BlipModel", "twice")
        return "BlipModel"
    raise UserError(
        "transformers has no BLIP class with this combination of parts; leave some out, e.g. --drop='temperature'"
    )


def _check_class_token(config: BLIPConfig, name: str, expected: str) -> None:
    """What a class projects of the image: the class token as it is, or, BlipModel's, normalised once more."""
    if config.vision is not None and config.vision.output_norm != expected:
        raise UserError(f"{name} needs model.vision.output_norm={expected!r}, found {config.vision.output_norm!r}")


def _check_answering(config: BLIPConfig) -> None:
    """BlipForQuestionAnswering makes both text stacks from one config, reading states of the image's width."""
    text, decoder = config.text, config.decoder
    assert text is not None and decoder is not None
    ours, theirs = (dataclasses.asdict(dataclasses.replace(stack, context_size=None)) for stack in (text, decoder))
    different = [name for name in ours if ours[name] != theirs[name]]
    if config.vision is not None and text.hidden_size != config.vision.hidden_size:
        widths = f"image {config.vision.hidden_size}, text {text.hidden_size}"
        raise UserError(f"BlipForQuestionAnswering needs one width for images and texts, found {widths}")
    if different:
        raise UserError(f"BlipForQuestionAnswering needs equal text stacks; they differ in {', '.join(different)}")


def left_out(config: BLIPConfig, name: str) -> dict[str, str]:
    """Parameters of which transformers' class `name` has no counterpart, and why that is no loss of function."""
    if name == "BlipForImageTextRetrieval" and config.temperature is not None:
        return {"temperature": f"{name} gives plain cosines (divide them by it: its value is printed above)"}
    return {}


def to_hf(config: BLIPConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers needs for this architecture."""
    name = hf_class(config)
    if name in ("BlipVisionModel", "BlipTextModel"):
        tower = _vision(config) if name == "BlipVisionModel" else _text(config)
        return {**tower, "architectures": [name], "dtype": dtype}
    joint = config.projection_dim or 256
    return {
        "model_type": "blip",
        "architectures": [name],
        "dtype": dtype,
        "projection_dim": joint if name == "BlipModel" else 512,
        "image_text_hidden_size": 256 if name == "BlipModel" else joint,
        "logit_scale_init_value": 2.6592 if config.logit_scale_init is None else config.logit_scale_init,
        "initializer_factor": 1.0,
        "tie_word_embeddings": config.tied_lm_head,
        "text_config": _text(config),
        "vision_config": _vision(config),
    }


def _text(config: BLIPConfig) -> dict[str, Any]:
    text = config.text or config.decoder
    assert text is not None
    return {
        "model_type": "blip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "encoder_hidden_size": text.context_size,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "max_position_embeddings": text.max_length,
        "hidden_act": TO_HF[text.activation],
        "layer_norm_eps": text.norm_eps,
        "hidden_dropout_prob": text.dropout_rate,
        "attention_probs_dropout_prob": text.attention_dropout_rate,
        "bos_token_id": config.bos_id,
        "eos_token_id": 2,
        "pad_token_id": text.pad_id,
        "sep_token_id": config.sep_id,
        "cls_token_id": config.cls_id,  # this and the next: for our own reader alone
        "enc_token_id": config.enc_id,
        "is_decoder": True,
        "tie_word_embeddings": config.tied_lm_head,
    }


def _vision(config: BLIPConfig) -> dict[str, Any]:
    vision = config.vision
    assert vision is not None
    return {
        "model_type": "blip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": TO_HF[vision.activation],
        "layer_norm_eps": vision.norm_eps,
        "attention_dropout": vision.attention_dropout_rate,
    }
