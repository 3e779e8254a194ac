"""Foreign dialects: how Hugging Face, OpenCLIP and BERT-like code name the towers that families share.

Each function returns the table of one tower with both sides relative to it; `rules.prefixed` puts it into a model.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlm.convert.rules import Rule, prefixed
from vlm.convert.transforms import PATCH_KERNEL, SPLIT_QKV, SPLIT_QKV_KERNEL, TRANSPOSE, leading_ones


def linear(foreign: str, ours: str) -> list[Rule]:
    """A torch Linear [out, in] with or without bias <-> kernel [in, out] and bias."""
    return [Rule(f"{foreign}.weight", f"{ours}/kernel", TRANSPOSE), Rule(f"{foreign}.bias", f"{ours}/bias")]


def norm(foreign: str, ours: str) -> list[Rule]:
    """A LayerNorm (or an RMSNorm, which has no bias)."""
    return [Rule(f"{foreign}.weight", f"{ours}/scale"), Rule(f"{foreign}.bias", f"{ours}/bias")]


def _many(names: Mapping[str, str], kind=linear) -> list[Rule]:
    return [rule for foreign, ours in names.items() for rule in kind(foreign, ours)]


def clip_layers(layers: str = "encoder.(layers|layer).{i}") -> list[Rule]:
    """The pre-norm layers of HF's CLIP code, the same in both towers."""
    attention = {f"self_attn.{x}_proj": f"attention/{y}" for x, y in zip("qkv", ("query", "key", "value"), strict=True)}
    rules = _many(attention | {"self_attn.out_proj": "attention/out", "mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"})
    rules += _many({"layer_norm1": "attention_norm", "layer_norm2": "mlp_norm"}, norm)
    return prefixed(rules, f"{layers}.", "layers/")


def clip_vit() -> list[Rule]:
    """HF's CLIP vision tower (spelling "pre_layrnorm" theirs)."""
    return [
        Rule("embeddings.class_embedding", "class_embedding"),
        Rule("embeddings.patch_embedding.weight", "patch_embedding/kernel", PATCH_KERNEL),
        Rule("embeddings.patch_embedding.bias", "patch_embedding/bias"),
        Rule("embeddings.position_embedding.weight", "position_embedding"),
        Rule("embeddings.position_ids", None),
        *norm("pre_layrnorm", "input_norm"),
        *norm("post_layernorm", "output_norm"),
        *clip_layers(),
    ]


def clip_text() -> list[Rule]:
    """HF's CLIP text tower."""
    return [
        Rule("embeddings.token_embedding.weight", "token_embedding/embedding"),
        Rule("embeddings.position_embedding.weight", "position_embedding/embedding"),
        Rule("embeddings.position_ids", None),
        *norm("final_layer_norm", "output_norm"),
        *clip_layers(),
    ]


def open_clip_layers() -> list[Rule]:
    """The layers of OpenAI's and OpenCLIP's code: q, k, v fused in `in_proj`."""
    qkv = ("attention/query", "attention/key", "attention/value")
    rules = [
        Rule("attn.in_proj_weight", tuple(f"{name}/kernel" for name in qkv), SPLIT_QKV_KERNEL),
        Rule("attn.in_proj_bias", tuple(f"{name}/bias" for name in qkv), SPLIT_QKV),
    ]
    rules += _many({"attn.out_proj": "attention/out", "mlp.c_fc": "mlp/up", "mlp.c_proj": "mlp/down"})
    rules += _many({"ln_1": "attention_norm", "ln_2": "mlp_norm"}, norm)
    return prefixed(rules, "transformer.resblocks.{i}.", "layers/")


def open_clip_vit() -> list[Rule]:
    """The vision tower of OpenAI's and OpenCLIP's code, without the output projection `proj` [E, D]."""
    return [
        Rule("class_embedding", "class_embedding"),
        Rule("conv1.weight", "patch_embedding/kernel", PATCH_KERNEL),
        Rule("positional_embedding", "position_embedding"),
        *norm("ln_pre", "input_norm"),
        *norm("ln_post", "output_norm"),
        *open_clip_layers(),
    ]


def open_clip_text() -> list[Rule]:
    """The text tower of OpenAI's and OpenCLIP's code, without the output projection `text_projection` [E, D]."""
    return [
        Rule("token_embedding.weight", "token_embedding/embedding"),
        Rule("positional_embedding", "position_embedding/embedding"),
        Rule("attn_mask", None),
        *norm("ln_final", "output_norm"),
        *open_clip_layers(),
    ]


def fused_vit(names: Mapping[str, str]) -> list[Rule]:
    """A vision tower with q, k, v fused in `qkv`, class token [1, 1, E] and positions [1, 1 + P, E].

    Args:
        names: what timm's code calls the parts (the keys of `TIMM`) -> what this dialect calls them.
    """
    qkv = ("attention/query", "attention/key", "attention/value")
    layer = [
        Rule(f"{names['attn.qkv']}.weight", tuple(f"{name}/kernel" for name in qkv), SPLIT_QKV_KERNEL),
        Rule(f"{names['attn.qkv']}.bias", tuple(f"{name}/bias" for name in qkv), SPLIT_QKV),
        *_many({names["attn.proj"]: "attention/out", "mlp.fc1": "mlp/up", "mlp.fc2": "mlp/down"}),
        *_many({names["norm1"]: "attention_norm", names["norm2"]: "mlp_norm"}, norm),
    ]
    return [
        Rule(names["cls_token"], "class_embedding", leading_ones(2)),
        Rule(names["pos_embed"], "position_embedding", leading_ones(1)),
        Rule(f"{names['patch_embed.proj']}.weight", "patch_embedding/kernel", PATCH_KERNEL),
        Rule(f"{names['patch_embed.proj']}.bias", "patch_embedding/bias"),
        *prefixed(layer, f"{names['blocks']}.{{i}}.", "layers/"),
        *norm(names["norm"], "output_norm"),
    ]


_PARTS = ("cls_token", "pos_embed", "patch_embed.proj", "blocks", "norm1", "attn.qkv", "attn.proj", "norm2", "norm")
TIMM = {name: name for name in _PARTS}
"""timm's own names, which the code of ALBEF, BLIP and LAVIS keeps."""
HF_BLIP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "norm": "post_layernorm",
}
"""Hugging Face's names for BLIP's vision tower."""


def hf_vit() -> list[Rule]:
    """Hugging Face's ViT and DeiT with their names of releases 4 and 5; classifiers and poolers are ignored."""
    layer = {f"attention.(attention.{name}|{name[0]}_proj)": f"attention/{name}" for name in ("query", "key", "value")}
    layer |= {"attention.(output.dense|o_proj)": "attention/out"}
    layer |= {"(intermediate.dense|mlp.fc1)": "mlp/up", "(output.dense|mlp.fc2)": "mlp/down"}
    norms = {"layernorm_before": "attention_norm", "layernorm_after": "mlp_norm"}
    return [
        Rule("embeddings.cls_token", "class_embedding", leading_ones(2)),
        Rule("embeddings.position_embeddings", "position_embedding", leading_ones(1)),
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", PATCH_KERNEL),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias"),
        *prefixed(_many(layer) + _many(norms, norm), "(encoder.layer|layers).{i}.", "layers/"),
        *norm("layernorm", "output_norm"),
        Rule("pooler.*", None),
    ]


def bert(
    *, layers: str = "(layer|layers)", pooler: bool | None = False, more: Mapping[str, str] | None = None
) -> list[Rule]:
    """HF's BERT, RoBERTa and XLM-R encoders.

    Args:
        layers: both spellings of the layers' name, the one to write first.
        pooler: False ignores pooler weights, None refuses them.
        more: further linear maps and (by the name "LayerNorm") norms of a layer: foreign -> ours.
    """
    layer = {f"attention.self.{name}": f"attention/{name}" for name in ("query", "key", "value")}
    layer |= {"attention.output.dense": "attention/out", "intermediate.dense": "mlp/up", "output.dense": "mlp/down"}
    norms = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"}
    for foreign, ours in (more or {}).items():
        (norms if foreign.endswith("LayerNorm") else layer)[foreign] = ours
    poolers = {True: linear("pooler.dense", "pooler"), False: [Rule("pooler.*", None)], None: []}
    return [
        Rule("embeddings.word_embeddings.weight", "token_embedding/embedding"),
        Rule("embeddings.position_embeddings.weight", "position_embedding/embedding"),
        Rule("embeddings.token_type_embeddings.weight", "token_type_embedding/embedding"),
        *norm("embeddings.LayerNorm", "embedding_norm"),
        Rule("embeddings.(position_ids|token_type_ids)", None),
        *prefixed(_many(layer) + _many(norms, norm), f"encoder.{layers}.{{i}}.", "layers/"),
        *poolers[pooler],
    ]


def roberta_lm_head(foreign: str, ours: str, embedding: str) -> list[Rule]:
    """RoBERTa's masked-language-modelling head; its decoder repeats the token embedding at path `embedding`."""
    return [
        *linear(f"{foreign}.dense", f"{ours}/dense"),
        *norm(f"{foreign}.layer_norm", f"{ours}/norm"),
        Rule(f"{foreign}.bias", f"{ours}/bias"),
        Rule(f"{foreign}.decoder.weight", embedding, duplicate=True),
        Rule(f"{foreign}.decoder.bias", f"{ours}/bias", duplicate=True),
    ]
