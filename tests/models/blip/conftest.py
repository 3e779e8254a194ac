"""Random Hugging Face BLIP models and, written independently of the converter, the same weights in our tree."""

import numpy as np
import pytest
import torch
import transformers

from vlm.encoders.vit import ViTConfig
from vlm.fusion.med import MedConfig
from vlm.models.blip.config import BLIPConfig
from vlm.models.blip.model import BLIP
from vlm.tree import unflatten

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 28}
TEXT |= {"max_position_embeddings": 20, "bos_token_id": 58, "sep_token_id": 2, "pad_token_id": 0}
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 36}
VISION |= {"image_size": 24, "patch_size": 8, "layer_norm_eps": 1e-5}
KINDS = {
    "captioning": (transformers.BlipForConditionalGeneration, {}),
    "answering": (transformers.BlipForQuestionAnswering, {"hidden_size": 24}),
    "retrieval": (transformers.BlipForImageTextRetrieval, {}),
    "features": (transformers.BlipModel, {}),
}
IDS = {"bos_id": 58, "enc_id": 59, "sep_id": 2, "cls_id": 1}

NAMES = {"self.query": "query", "self.key": "key", "self.value": "value", "output.dense": "out"}
TEXT_LAYER = {f"attention.{a}": f"attention/{b}" for a, b in NAMES.items()}
TEXT_LAYER |= {f"crossattention.{a}": f"cross_attention/{b}" for a, b in NAMES.items()}
TEXT_LAYER |= {
    "attention.output.LayerNorm": "attention_norm",
    "crossattention.output.LayerNorm": "cross_attention_norm",
}
TEXT_LAYER |= {"intermediate.dense": "mlp/up", "output.dense": "mlp/down", "output.LayerNorm": "mlp_norm"}
VISION_LAYER = {"layer_norm1": "attention_norm", "self_attn.projection": "attention/out", "layer_norm2": "mlp_norm"}
VISION_LAYER |= {"mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}
HEADS = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
HEADS |= {"visual_projection": "vision_projection", "text_projection": "text_projection"}


def _our_tree(state):
    """Parameters, or their gradients, of a Hugging Face BLIP model as our nested dict."""
    left = {name: np.asarray(value) for name, value in state.items()}
    ours = {}

    def put(name, path):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in left:
                value = left.pop(f"{name}.{kind}")
                norm = kind == "weight" and value.ndim == 1
                ours[f"{path}/{'scale' if norm else 'kernel' if kind == 'weight' else 'bias'}"] = value.T

    def stack(name, path, layers):
        count = len({k[len(name) :].split(".")[0] for k in left if k.startswith(name)})
        for foreign, target in layers.items():
            for i in range(count):
                put(f"{name}{i}.{foreign}", f"{path}/{i}/{target}")
        for target in {k.split("/", 3)[3] for k in ours if k.startswith(f"{path}/0/")}:
            ours[f"{path}/{target}"] = np.stack([ours.pop(f"{path}/{i}/{target}") for i in range(count)])

    for name, path in (("text_encoder", "text"), ("text_model", "text"), ("text_decoder.bert", "decoder")):
        if f"{name}.embeddings.LayerNorm.bias" not in left:
            continue
        stack(f"{name}.encoder.layer.", f"{path}/layers", TEXT_LAYER)
        put(f"{name}.embeddings.LayerNorm", f"{path}/embedding_norm")
        put(f"{name}.pooler.dense", f"{path}/pooler")
        for kind in ("token", "position"):
            table = left.pop(f"{name}.embeddings.{kind.replace('token', 'word')}_embeddings.weight")
            ours[f"{path}/{kind}_embedding/embedding"] = table
    for i in range(VISION["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = np.split(left.pop(f"vision_model.encoder.layers.{i}.self_attn.qkv.{kind}"), 3)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                left[f"vision_model.encoder.layers.{i}.{part}.{kind}"] = value
    extra = {part: f"attention/{part}" for part in ("query", "key", "value")}
    stack("vision_model.encoder.layers.", "vision/layers", VISION_LAYER | extra)
    put("vision_model.post_layernorm", "vision/output_norm")
    patch = left.pop("vision_model.embeddings.patch_embedding.weight")
    ours["vision/patch_embedding/kernel"] = patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0])
    ours["vision/patch_embedding/bias"] = left.pop("vision_model.embeddings.patch_embedding.bias")
    ours["vision/class_embedding"] = left.pop("vision_model.embeddings.class_embedding")[0, 0]
    ours["vision/position_embedding"] = left.pop("vision_model.embeddings.position_embedding")[0]
    put("text_decoder.cls.predictions.transform.dense", "lm_head/dense")
    put("text_decoder.cls.predictions.transform.LayerNorm", "lm_head/norm")
    for name in ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"):
        if name in left:
            ours["lm_head/bias"] = left.pop(name)
    left.pop("text_decoder.cls.predictions.decoder.weight", None)
    for name, path in HEADS.items():
        put(name, path)
    if "logit_scale" in left:
        ours["logit_scale"] = left.pop("logit_scale")
    assert not left, sorted(left)
    return unflatten(ours)


def _med(config, context_size, **options):
    return MedConfig(
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.max_position_embeddings,
        context_size,
        norm_eps=config.layer_norm_eps,
        **options,
    )


def _our_config(kind, config):
    text, vision = config.text_config, config.vision_config
    vit = ViTConfig(
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
        vision.image_size,
        vision.patch_size,
        activation="gelu",
        norm_eps=vision.layer_norm_eps,
        patch_bias=True,
        input_norm=False,
        output_norm="twice" if kind == "features" else "all",
        init="normal",
    )
    width = vision.hidden_size
    parts = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None, "encoder_token": "cls"}
    if kind == "captioning":
        parts |= {"text": None, "decoder": _med(text, width)}
    elif kind == "answering":
        parts |= {"text": _med(text, width), "decoder": _med(text, text.hidden_size)}
    elif kind == "retrieval":
        parts |= {"text": _med(text, width), "projection_dim": config.image_text_hidden_size, "itm": True}
    else:
        parts |= {"text": _med(text, width, pooler=True), "projection_dim": config.projection_dim}
        parts |= {"projection_bias": False, "logit_scale_init": config.logit_scale_init_value}
    return BLIPConfig(vision=vit, **parts, **IDS)


@pytest.fixture(scope="module")
def hf_pair(randomise):
    """By kind ("captioning", …): a random HF model, our module, its parameters."""
    made = {}

    def make(kind):
        if kind not in made:
            cls, text = KINDS[kind]
            config = transformers.BlipConfig(
                text_config=TEXT | text, vision_config=VISION, projection_dim=14, image_text_hidden_size=10
            )
            config._attn_implementation = "eager"
            reference = randomise(cls(config), scale=0.15)
            made[kind] = (reference, BLIP(_our_config(kind, config)), _our_tree(dict(reference.state_dict())))
        return made[kind]

    return make


@pytest.fixture
def torch_image():
    """(ours [B, H, W, 3], theirs [B, 3, H, W]) of a size, random."""

    def make(rows=24, columns=24, batch=3, seed=0):
        image = np.random.default_rng(seed).normal(size=(batch, rows, columns, 3)).astype(np.float32)
        return image, torch.from_numpy(image.transpose(0, 3, 1, 2).copy())

    return make


@pytest.fixture(scope="session")
def our_tree():
    """The mapping itself, for gradients."""
    return _our_tree
