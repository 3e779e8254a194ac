"""FLAVA's foreign names: Hugging Face's, torchmultimodal's, those of the original training code and of DALL-E.

torchmultimodal renamed its layers, norms and projections several times in 2022; one table reads all its releases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vlm.convert.blocks import linear, norm
from vlm.convert.layouts import Layout
from vlm.convert.rules import Rule, prefixed
from vlm.convert.transforms import CONVOLUTION, PATCH_KERNEL, SCALAR, TRANSPOSE, leading_ones

HEADS = ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head")

_HF_LAYER = {
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "attention_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
}
_TMM_LAYER = {
    "attention/query": "attention.(|attention.)query",
    "attention/key": "attention.(|attention.)key",
    "attention/value": "attention.(|attention.)value",
    "attention/out": "attention.output",
    "mlp/up": "(feedforward.model.0|intermediate)",
    "mlp/down": "(feedforward.model.2|feedforward.model.3|output)",  # 3 behind a dropout
    "attention_norm": "(attention_layernorm|layernorm_before)",
    "mlp_norm": "(feedforward_layernorm|layernorm_after)",
}


def _encoder(layer: Mapping[str, str]) -> list[Rule]:
    """Layers, the norm after the last, and the pooler."""
    rules = [
        rule for ours, foreign in layer.items() for rule in (norm if ours.endswith("_norm") else linear)(foreign, ours)
    ]
    return [
        *prefixed(rules, "encoder.layer.{i}.", "layers/"),
        *norm("layernorm", "output_norm"),
        *linear("pooler.dense", "pooler"),
    ]


def _image(layer: Mapping[str, str]) -> list[Rule]:
    return [
        Rule("embeddings.cls_token", "class_embedding", leading_ones(2)),
        Rule("embeddings.mask_token", "mask_embedding", leading_ones(2)),
        Rule("embeddings.position_embeddings", "position_embedding", leading_ones(1)),
        Rule("embeddings.patch_embeddings.projection.weight", "patch_embedding/kernel", PATCH_KERNEL),
        Rule("embeddings.patch_embeddings.projection.bias", "patch_embedding/bias"),
        *_encoder(layer),
    ]


def _text(layer: Mapping[str, str], embedding_norm: str = "LayerNorm") -> list[Rule]:
    return [
        Rule("embeddings.word_embeddings.weight", "token_embedding/embedding"),
        Rule("embeddings.position_embeddings.weight", "position_embedding/embedding"),
        Rule("embeddings.token_type_embeddings.weight", "token_type_embedding/embedding"),
        *norm(f"embeddings.{embedding_norm}", "embedding_norm"),
        Rule("embeddings.(position_ids|token_type_ids)", None),
        *_encoder(layer),
    ]


def _fusion(layer: Mapping[str, str], class_token: str = "cls_token") -> list[Rule]:  # noqa: S107
    return [Rule(class_token, "class_embedding", leading_ones(2)), *_encoder(layer)]


def _projections(joint: str, fused: str = "{}_to_mm_projection") -> list[Rule]:
    """`joint` is the prefix of those into the joint space, `fused` the name of those into the fusion encoder."""
    rules: list[Rule] = []
    for theirs, ours in (("image", "vision"), ("text", "text")):
        rules += linear(f"{joint}{theirs}_projection", f"{ours}_projection")
        rules += linear(fused.format(theirs), f"{ours}_to_fusion")
    return rules


def _head(foreign: str, ours: str, dense: str, norm_: str) -> list[Rule]:
    """A head of masked prediction. Its output bias has two names; files have one of them or both."""
    return [
        *linear(f"{foreign}.{dense}", f"{ours}/dense"),
        *norm(f"{foreign}.{norm_}", f"{ours}/norm"),
        Rule(f"{foreign}.decoder.weight", f"{ours}/kernel", TRANSPOSE),
        Rule(f"{foreign}.decoder.bias", f"{ours}/bias"),
        Rule(f"{foreign}.bias", f"{ours}/bias", duplicate=True),
    ]


def _matching(pooler: str, out: str) -> list[Rule]:
    return [*linear(f"{pooler}.dense", "itm_head/pooler"), *linear(f"{out}.seq_relationship", "itm_head/out")]


def _convolution(foreign: str, ours: str, weight: str, bias: str) -> list[Rule]:
    return [Rule(f"{foreign}.{weight}", f"{ours}/kernel", CONVOLUTION), Rule(f"{foreign}.{bias}", f"{ours}/bias")]


def _codebook(size: tuple[int, int], hf: bool) -> list[Rule]:
    """DALL-E's encoder of `size` groups and blocks per group, with its own names or Hugging Face's for them."""
    group, path, *ends = (".group", ".path", "weight", "bias") if hf else ("", "", "w", "b")
    rules = _convolution("blocks.input", "input", *ends) + _convolution("blocks.output.conv", "out", *ends)
    for number in range(1, size[0] + 1):
        for block in range(1, size[1] + 1):
            foreign, ours = f"blocks.group_{number}{group}.block_{block}", f"group_{number}/block_{block}"
            rules += _convolution(f"{foreign}.id_path", f"{ours}/identity", *ends)
            for k in range(1, 5):
                rules += _convolution(f"{foreign}.res_path{path}.conv_{k}", f"{ours}/conv_{k}", *ends)
    return rules


def _hugging_face(prefix: str, size: tuple[int, int]) -> list[Rule]:
    towers = {"image": "vision", "text": "text", "multimodal": "fusion"}
    rules = {"image": _image(_HF_LAYER), "text": _text(_HF_LAYER), "multimodal": _fusion(_HF_LAYER)}
    return [
        *(r for n, ours in towers.items() for r in prefixed(rules[n], f"{prefix}{n}_model.", f"{ours}/")),
        *_projections(prefix, f"{prefix}{{}}_to_mm_projection"),
        Rule(f"{prefix}logit_scale", "logit_scale", SCALAR),
        *(rule for name in HEADS for rule in _head(name, name, "transform.dense", "transform.LayerNorm")),
        *_matching("itm_head.pooler", "itm_head"),
        *prefixed(_codebook(size, True), "image_codebook.", "codebook/"),
    ]


def _torchmultimodal(size: tuple[int, int]) -> list[Rule]:
    heads = {"mim_loss": "mim_head", "mlm_loss": "mlm_head", "mmm_loss.mim": "mmm_image_head"}
    heads |= {"mmm_loss.mlm": "mmm_text_head"}
    return [
        *prefixed(_image(_TMM_LAYER), "(model.|)image_encoder.", "vision/"),
        *prefixed(_text(_TMM_LAYER, "(layer_norm|LayerNorm)"), "(model.|)text_encoder.", "text/"),
        *prefixed(_fusion(_TMM_LAYER), "(model.|)mm_encoder.", "fusion/"),
        *_projections("(model.|loss.contrastive_loss.|)", "(model.|){}_to_mm_projection"),
        Rule("loss.contrastive_loss.logit_scale", "logit_scale", SCALAR),
        *(r for theirs, ours in heads.items() for r in _head(f"loss.{theirs}.cls", ours, "dense", "layer_norm")),
        *_matching("loss.itm_loss.pooler", "loss.itm_loss.cls"),
        *prefixed(_codebook(size, False), "image_codebook.encoder.", "codebook/"),
        *linear("classifier.model.0", "classifier/dense"),
        *linear("classifier.model.(3|2)", "classifier/out"),  # 2 without dropout
    ]


def _original() -> list[Rule]:
    heads = {"imagenet.mim_head": "mim_head", "fairseq_mlm": "mlm_head"}
    heads |= {"cmd.mim_head": "mmm_image_head", "cmd.mlm_head": "mmm_text_head"}
    names = ("transform.dense", "transform.LayerNorm")
    rules = [
        *prefixed(_image(_HF_LAYER), "image_encoder.module.", "vision/"),
        *prefixed(_text(_HF_LAYER), "text_encoder.module.", "text/"),
        *prefixed(_fusion(_HF_LAYER, "encoder.cls_token"), "mm_encoder.module.", "fusion/"),
        Rule("(image|text)_encoder.embeddings*", None),  # the same again
        *_projections("", "mm_{}_projection"),
        Rule("heads.cmd.clip_head.logit_scale", "logit_scale", SCALAR),
        *(r for theirs, ours in heads.items() for r in _head(f"heads.{theirs}.cls.predictions", ours, *names)),
        *_matching("heads.cmd.itm_head.pooler", "heads.cmd.itm_head.cls"),
    ]
    return prefixed(rules, "(model.|)", "")


HF, TEXT, IMAGE, MULTIMODAL = (f"FLAVA{part} (Hugging Face)" for part in ("", " text", " image", " multimodal"))
CODEBOOK, DALLE = "FLAVA codebook (Hugging Face)", "DALL-E encoder"
ORIGINAL, TMM = "FLAVA (original training code)", "FLAVA (torchmultimodal)"

_FIRST = r"encoder\.layer\.0\.layernorm_before"
_MARKS = {
    HF: (rf"(flava\.)?(image|text|multimodal)_model\.{_FIRST}",),
    TEXT: (r"embeddings\.word_embeddings", _FIRST),
    IMAGE: (r"embeddings\.patch_embeddings", _FIRST),
    MULTIMODAL: (_FIRST,),
    CODEBOOK: (r"(image_codebook\.)?blocks\.group_1\.group\.block_1",),
    DALLE: (r"(encoder\.)?blocks\.group_1\.block_1",),
    ORIGINAL: (r"(model\.)?(image|text|mm)_encoder\.module\.",),
    TMM: (r"(model\.){0,2}(image|text|mm)_encoder\.encoder\.layer\.0\.(attention_layernorm|layernorm_before)",),
}
"""The first that fits is it: what a layout's names must contain."""


def table(layout: str, size: tuple[int, int] = (4, 2), prefix: str = "(flava.|)") -> tuple[Rule, ...]:
    """The table of a layout, of which exports write the first spelling of each name.

    Args:
        size: groups of the codebook and blocks in each.
        prefix: of Hugging Face's names; "(|flava.)" writes FlavaModel's.
    """
    tables = {
        HF: lambda: _hugging_face(prefix, size),
        TEXT: lambda: prefixed(_text(_HF_LAYER), "", "text/"),
        IMAGE: lambda: prefixed(_image(_HF_LAYER), "", "vision/"),
        MULTIMODAL: lambda: prefixed(_fusion(_HF_LAYER), "", "fusion/"),
        CODEBOOK: lambda: prefixed(_codebook(size, True), "(|image_codebook.)", "codebook/"),
        DALLE: lambda: prefixed(_codebook(size, False), "(|encoder.)", "codebook/"),
        ORIGINAL: _original,
        TMM: lambda: _torchmultimodal(size),
    }
    return tuple(tables[layout]())


def codebook_size(names: Iterable[str]) -> tuple[int, int]:
    """Groups of a codebook and the most blocks in one, counted by name; (4, 2) where there is none."""
    found = [re.search(r"(?:^|\.)group_(\d{1,2})\.(?:group\.)?block_(\d{1,2})\.", name) for name in names]
    sizes = [(int(match[1]), int(match[2])) for match in found if match]
    return (max(g for g, _ in sizes), max(b for _, b in sizes)) if sizes else (4, 2)


LAYOUTS = tuple(Layout(name, marks, table(name)) for name, marks in _MARKS.items())
