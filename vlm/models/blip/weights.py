"""BLIP's tables: every published layout of its checkpoints, read and written.

The authors' .pth files and LAVIS's, which have the same names: pretraining and retrieval (with momentum teacher and
queues, which become the training state's `extra`), captioning, question answering, NLVR2, classification. Hugging
Face's: BlipModel, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval, and the towers
alone. ViT (timm, DeiT, Hugging Face) and BERT are read as towers too: pretraining starts from them (`start.assemble`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from vlm.convert.blocks import HF_BLIP, TIMM, bert, fused_vit, hf_vit, linear, norm
from vlm.convert.layouts import Imported, Layout, detect
from vlm.convert.rules import Rule, equal, export_tensors, import_tensors, prefixed, sizes_from
from vlm.convert.transforms import INT32, SCALAR, TRANSPOSE, leading_ones, then
from vlm.convert.views import TensorView
from vlm.errors import UserError
from vlm.models.blip.config import BLIPConfig
from vlm.models.blip.hf_config import architecture, with_tokenizer
from vlm.models.blip.hf_export import hf_class, left_out, to_hf
from vlm.models.blip.start import assemble
from vlm.models.blip.transfer import TASKS, to_task

__all__ = ["EXTRA", "HF_MODEL_TYPES", "LAYOUTS", "TASKS", "Imported", "assemble", "max_tokens", "read", "to_task"]
__all__ += ["with_tokenizer", "without"]

HF_MODEL_TYPES = ("blip", "blip_vision_model", "blip_text_model", "vit", "deit")
EXTRA = ("teacher", "image_queue", "text_queue", "queue_index", "id_queue")
"""What a model folder keeps of a training state beside the parameters."""

FREE = ("video", "encoder_token")
"""Fields of the architecture that decide on no parameter: they may be changed of any checkpoint."""

Shapes = Callable[[BLIPConfig], Mapping[str, Any]]
Views = Mapping[str, TensorView]

_CROSS = {f"crossattention.self.{name}": f"cross_attention/{name}" for name in ("query", "key", "value")}
_CROSS |= {"crossattention.output.dense": "cross_attention/out"}
_NORM = {"crossattention.output.LayerNorm": "cross_attention_norm"}
_TWIN = {
    f"crossattention.self{i}.{name}": f"cross_attention_{i}/{name}" for i in "01" for name in ("query", "key", "value")
}
_TWIN |= {f"crossattention.output.dense{i}": f"cross_attention_{i}/out" for i in "01"}
_HEAD = "text_decoder.cls.predictions"
_MERGE = "crossattention.output.merge_layer"


def _vit(names: Mapping[str, str], foreign: str, ours: str = "vision/") -> list[Rule]:
    return prefixed([*fused_vit(names), Rule("embeddings.position_ids", None)], foreign, ours)


def _med(foreign: str, ours: str, pooler: bool | None = None) -> list[Rule]:
    """A text stack whose layers have cross-attention."""
    return prefixed(bert(layers="layer", pooler=pooler, more=_CROSS | _NORM), foreign, ours)


def _twin_med(merged: range, depth: int) -> list[Rule]:
    """NLVR2's encoder: the first layers average what they read from two images, the `merged` ones map it."""
    rules = bert(layers="layer", pooler=None, more=_TWIN | {_MERGE: "merge"} | _NORM)
    found: list[Rule] = []
    for rule in prefixed(rules, "text_encoder.", "text/"):
        if "{i}" not in rule.foreign:
            found.append(rule)
            continue
        for name, layers in (("average", range(merged.start)), ("merge", range(merged.start, depth))):
            assert isinstance(rule.ours, str)
            path = rule.ours.replace("text/layers/", f"text/{name}_layers/")
            if layers and (name == "merge" or _MERGE not in rule.foreign):
                found.append(dataclasses.replace(rule, ours=path, layers=layers))
    return found


def _sharing_decoder() -> list[Rule]:
    """The pretraining decoder, stored whole: all but its self-attention is the encoder's."""

    def shared(rule: Rule) -> Rule:
        if isinstance(rule.ours, str) and re.match(r"text/layers/attention(_norm)?/", rule.ours):
            return dataclasses.replace(rule, ours=rule.ours.replace("/attention", "/decoder_attention"))
        return dataclasses.replace(rule, duplicate=rule.ours is not None)

    return [shared(rule) for rule in _med("text_decoder.bert.", "text/")]


def _lm_head(embedding: str, own_kernel: bool, own_bias: bool) -> list[Rule]:
    """The decoder's head. Its output weight and bias are stored twice: as the token embedding `embedding` and as
    `predictions.bias`. Where the copies differ, the decoder's are those that are used.
    """
    head = _HEAD
    bias = Rule(f"{head}.bias", None) if own_bias else Rule(f"{head}.bias", "lm_head/bias")
    weight = Rule(f"{head}.decoder.weight", embedding, duplicate=True)
    if own_kernel:
        weight = Rule(f"{head}.decoder.weight", "lm_head/kernel", TRANSPOSE)
    return [
        *linear(f"{head}.transform.dense", "lm_head/dense"),
        *norm(f"{head}.transform.LayerNorm", "lm_head/norm"),
        bias,
        Rule(f"{head}.decoder.bias", "lm_head/bias", duplicate=not own_bias),
        weight,
    ]


def _bert(ours: str) -> list[Rule]:
    """BERT, or BLIP's text stack with its head, saved alone; old files name the norms' parameters gamma and beta."""

    def either(rule: Rule) -> Rule:
        if "token_type" in rule.foreign:
            return Rule(rule.foreign, None)
        names = rule.foreign.replace("LayerNorm.weight", "LayerNorm.(weight|gamma)")
        return dataclasses.replace(rule, foreign=names.replace("LayerNorm.bias", "LayerNorm.(bias|beta)"))

    rules = prefixed(bert(layers="layer", more=_CROSS | _NORM), "bert.", ours)
    if ours == "decoder/":
        head = _lm_head("decoder/token_embedding/embedding", False, False)
        rules += [dataclasses.replace(rule, foreign=rule.foreign.removeprefix("text_decoder.")) for rule in head]
    return [*map(either, rules), Rule("cls.seq_relationship.*", None)]


def _heads(*names: str) -> list[Rule]:
    paths = {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
    paths |= {"cls_head.0": "classifier/dense", "cls_head.2": "classifier/out"}
    return [rule for name in names for rule in linear(name, paths[name])]


_MATCHING = ("vision_proj", "text_proj", "itm_head")


def _momentum(index: str) -> list[Rule]:
    """Teacher and queues; the queue's pointer is called `index`."""
    teacher = [
        *_vit(TIMM, "visual_encoder_m.", "vision/"),
        *_med("text_encoder_m.", "text/"),
        *linear("vision_proj_m", "vision_projection"),
        *linear("text_proj_m", "text_projection"),
        *linear("cls_head_m.0", "classifier/dense"),
        *linear("cls_head_m.2", "classifier/out"),
    ]
    return [
        *prefixed(teacher, "", "extra/teacher/"),
        Rule("image_queue", "extra/image_queue", TRANSPOSE),
        Rule("text_queue", "extra/text_queue", TRANSPOSE),
        Rule(index, "extra/queue_index", then(leading_ones(1), INT32)),
        Rule("idx_queue", "extra/id_queue", then(leading_ones(1), INT32)),
    ]


def _table(name: str, own_kernel: bool = False, own_bias: bool = False, nlvr: tuple[range, int] | None = None):
    """The table of a layout.

    Args:
        name: its key in `_MARKS`.
        own_kernel, own_bias: see `_lm_head`.
        nlvr: layers that merge, and number of layers.
    """
    hf = name.startswith("Blip")
    vision = _vit(HF_BLIP, "vision_model.") if hf else _vit(TIMM, "visual_encoder.")
    encoder = _med("text_encoder.", "text/")
    own_head = _lm_head("decoder/token_embedding/embedding", own_kernel, own_bias)
    decoder = [*_med("text_decoder.bert.", "decoder/"), *own_head]
    temperature = Rule("temp", "temperature", SCALAR)
    tables: dict[str, Callable[[], list[Rule]]] = {
        "pretraining": lambda: [
            *(*vision, *encoder, *_sharing_decoder(), *_heads(*_MATCHING), temperature),
            *_lm_head("text/token_embedding/embedding", own_kernel, own_bias),
            *_momentum("(queue_ptr|ptr_queue)"),
        ],
        "retrieval": lambda: [
            *(*vision, *encoder, *_heads(*_MATCHING), temperature),
            *_momentum("(ptr_queue|queue_ptr)"),
        ],
        "captioning": lambda: [*vision, *decoder],
        "question answering": lambda: [*vision, *encoder, *decoder],
        "NLVR2": lambda: [*vision, *_twin_med(*(nlvr or (range(6, 12), 12))), *_heads("cls_head.0", "cls_head.2")],
        "classification": lambda: [
            *(*vision, *encoder, *_heads("cls_head.0", "cls_head.2"), *_momentum("(ptr_queue|queue_ptr)"))
        ],
        "BlipForImageTextRetrieval": lambda: [*vision, *encoder, *_heads(*_MATCHING)],
        "BlipForQuestionAnswering": lambda: [*vision, *encoder, *decoder],
        "BlipForConditionalGeneration": lambda: [*vision, *decoder],
        "BlipModel": lambda: [
            *(*vision, *_med("text_model.", "text/", pooler=True), Rule("logit_scale", "logit_scale", SCALAR)),
            Rule("visual_projection.weight", "vision_projection/kernel", TRANSPOSE),
            Rule("text_projection.weight", "text_projection/kernel", TRANSPOSE),
        ],
        "BlipVisionModel": lambda: _vit(HF_BLIP, ""),
        "BlipTextModel": lambda: _med("", "text/", pooler=True),
        "BERT with its head": lambda: _bert("decoder/"),
        "BERT": lambda: _bert("text/"),
        "ViT (timm)": lambda: [*_vit(TIMM, ""), Rule("(head|head_dist|pre_logits).*", None)],
        "ViT (Hugging Face)": lambda: [
            *prefixed(hf_vit(), "(vit.|deit.|)", "vision/"),
            Rule("(classifier|cls_classifier).*", None),
        ],
    }
    return tuple(tables[name]())


_PTH, _HF = r"visual_encoder\.", r"vision_model\."
_MARKS = {
    "NLVR2": (_PTH, r"text_encoder\..*crossattention\.self0"),
    "pretraining": (_PTH, r"text_encoder\.", r"text_decoder\.", r"itm_head\.|text_encoder_m\.|temp$"),
    "classification": (_PTH, r"text_encoder\.", r"cls_head\."),
    "question answering": (_PTH, r"text_encoder\.", r"text_decoder\."),
    "captioning": (_PTH, r"text_decoder\."),
    "retrieval": (_PTH, r"text_encoder\."),
    "BlipForQuestionAnswering": (_HF, r"text_encoder\.", r"text_decoder\."),
    "BlipForConditionalGeneration": (_HF, r"text_decoder\."),
    "BlipForImageTextRetrieval": (_HF, r"text_encoder\."),
    "BlipModel": (_HF, r"text_model\..*crossattention"),
    "BlipVisionModel": (r"embeddings\.class_embedding$", r"encoder\.layers\.0\.self_attn\.qkv"),
    "BlipTextModel": (r"embeddings\.word_embeddings", r"encoder\.layer\.0\.crossattention"),
    "BERT with its head": (r"bert\.embeddings\.word_embeddings", r"cls\.predictions\.transform"),
    "BERT": (r"bert\.embeddings\.word_embeddings",),
    "ViT (timm)": (r"cls_token$", r"blocks\.0\.attn\.qkv"),
    "ViT (Hugging Face)": (r"(vit\.|deit\.)?embeddings\.cls_token", r".*\.layernorm_before"),
}
"""The first that fits is it: what a layout's names must contain; what it adds to those below it stands first."""


def _title(name: str) -> str:
    if name.startswith(("BERT", "ViT")):
        return name
    return f"{name} (Hugging Face)" if name.startswith("Blip") else f"BLIP for {name} (.pth)"


_OTHERS = {"ViT (Hugging Face)": (r"(.*\.)?embeddings\.mask_token",)}  # FLAVA's image tower has the same names
LAYOUTS = tuple(Layout(_title(name), marks, _table(name), _OTHERS.get(name, ())) for name, marks in _MARKS.items())


def read(
    tensors: Views,
    config: Mapping[str, Any] | None,
    *,
    source: str,
    shapes: Shapes,
    overrides: Mapping[str, Any] | None = None,
) -> Imported:
    """Maps the tensors of any known layout to parameters, and to `extra` what a pretraining or retrieval file has more.

    Args:
        tensors: the foreign tensors by name.
        config: the parsed config.json beside them (of Hugging Face), or None: sizes then follow from shapes.
        source: names the checkpoint in errors.
        shapes: (architecture) -> anything with a `shape` by parameter path, for every parameter that it has.
        overrides: architecture values to change, e.g. {"text.num_heads": 12}.

    Raises:
        UserError: unknown layout; or names, shapes and the config do not fit one another (all problems listed).
    """
    layout = detect(LAYOUTS, tensors, source)
    name = next(name for name in _MARKS if _title(name) == layout.name)
    where, notes = f"{source} ({layout.name})", []
    hf = name.startswith("Blip")
    untied = hf and (config or {}).get("tie_word_embeddings") is False and f"{_HEAD}.bias" in tensors
    if untied and f"{_HEAD}.decoder.weight" not in tensors:
        raise UserError(f"{where}: tie_word_embeddings is false, but {_HEAD}.decoder.weight is missing")
    rules = _table(name, *_own_head(tensors, notes), nlvr=_merged(tensors))
    views = import_tensors(tensors, rules, None, source=where, partial=True)
    given = config if hf or name.startswith(("BERT", "ViT")) else None
    with sizes_from(tensors, rules, where):
        built = architecture(given, views, notes, hf=hf, overrides=overrides or {})
    target = dict(shapes(built))
    target |= _extra_shapes(views, target, built)
    found = import_tensors(tensors, rules, target, source=where)
    extra = {path.removeprefix("extra/"): view for path, view in found.items() if path.startswith("extra/")}
    params = {path: view for path, view in found.items() if not path.startswith("extra/")}
    return Imported(built, params, layout.name, notes, extra)


def _own_head(tensors: Views, notes: list[str]) -> tuple[bool, bool]:
    """Whether the head's output weight, and its bias, differ from the copies that they are usually tied to."""
    copies = {
        f"{_HEAD}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        f"{_HEAD}.decoder.bias": f"{_HEAD}.bias",
    }
    own = [b in tensors and a in tensors and not equal(tensors[a], tensors[b]) for a, b in copies.items()]
    for name, different in zip(copies, own, strict=True):
        if different:
            notes.append(f"warning: {name} differs from {copies[name]}, usually tied to it: {name} is used as it is")
    return own[0], own[1]


def _merged(tensors: Iterable[str]) -> tuple[range, int]:
    """Of NLVR2's encoder: the layers that merge by a linear map, and the number of layers."""
    layers = [re.match(r"text_encoder\.encoder\.layer\.(\d{1,4})\.(.*)", name) for name in tensors]
    depth = 1 + max((int(m[1]) for m in layers if m), default=-1)
    merged = [int(m[1]) for m in layers if m and m[2].startswith(_MERGE)]
    return range(min(merged, default=depth), depth), depth


def _extra_shapes(views: Views, params: Mapping[str, Any], config: BLIPConfig) -> dict[str, Any]:
    """What `extra` must be where a file has any of it: a whole teacher, queues of the joint space's width."""
    extra = {path: view for path, view in views.items() if path.startswith("extra/")}
    parts = {path.split("/")[2] for path in extra if path.startswith("extra/teacher/")}
    grounded = any("/cross_attention" in path for path in extra)  # the teacher does not use it, but files have it
    teacher = {
        f"extra/teacher/{path}": leaf
        for path, leaf in params.items()
        if path.split("/")[0] in parts
        and "/decoder_attention" not in path
        and (grounded or "/cross_attention" not in path)
    }
    queues = {}
    for name in ("image_queue", "text_queue", "id_queue"):
        if f"extra/{name}" in extra:
            rows = extra.get("extra/image_queue", extra[f"extra/{name}"]).shape[:1]
            queues[f"extra/{name}"] = SimpleNamespace(
                shape=rows if name == "id_queue" else (*rows, config.projection_dim)
            )
    if "extra/queue_index" in extra:
        queues["extra/queue_index"] = SimpleNamespace(shape=())
    return teacher | queues


def max_tokens(config: BLIPConfig) -> int | None:
    """Longest row of tokens that every text stack takes; None without one."""
    return min((stack.max_length for stack in (config.text, config.decoder) if stack is not None), default=None)


def without(config: BLIPConfig, params: Mapping[str, Any]) -> BLIPConfig:
    """The architecture that has only the optional parts whose parameters are left."""

    def kept(part: str) -> bool:
        return any(path == part or path.startswith(f"{part}/") for path in params)

    return dataclasses.replace(
        config,
        itm=config.itm and kept("itm_head"),
        projection_dim=config.projection_dim if kept("vision_projection") else None,
        temperature=config.temperature if kept("temperature") else None,
        logit_scale_init=config.logit_scale_init if kept("logit_scale") else None,
        num_labels=config.num_labels if kept("classifier") else None,
    )


def write(
    config: BLIPConfig, params: Views, notes: list[str] | None = None
) -> tuple[dict[str, TensorView], dict[str, Any]]:
    """Returns the tensors and the config.json that transformers loads; `notes` receives what it cannot hold.

    Raises:
        UserError: no transformers class holds this combination of parts.
    """
    name = hf_class(config)
    lost = left_out(config, name)
    full, params = params, {path: view for path, view in params.items() if path not in lost}
    if notes is not None:
        notes += [f"left out {path} = {float(full[path].read()):.4g}: {reason}" for path, reason in lost.items()]
    rules = _table(name, own_kernel=not config.tied_lm_head)
    dtypes = {str(view.dtype) for view in params.values()}
    tensors = export_tensors(params, rules, target=f"export as {name}", duplicates=not config.tied_lm_head)
    return tensors, to_hf(config, dtypes.pop() if len(dtypes) == 1 else "float32")


def write_original(config: BLIPConfig, params: Views, extra: Views) -> dict[str, TensorView]:
    """Returns the tensors under the names of the authors' .pth files, teacher and queues included.

    Raises:
        UserError: no such file holds this combination of parts.
    """
    name = _original(config)
    merging = params.get("text/merge_layers/merge/kernel")
    depth = 0 if config.text is None else config.text.num_layers
    merged = range(depth - (merging.shape[0] if merging is not None else 0), depth)
    rules = _table(name, own_kernel=not config.tied_lm_head, nlvr=(merged, depth))
    tensors = dict(params)
    if any(path.startswith("teacher/") for path in extra):  # what a teacher has no copy of, it shares with its student
        parts = {path.split("/")[1] for path in extra if path.startswith("teacher/")}
        shared = {path: view for path, view in params.items() if path.split("/")[0] in parts}
        shared = {path: view for path, view in shared.items() if "/decoder_attention" not in path}
        tensors |= {f"extra/teacher/{path}": view for path, view in shared.items()}
    tensors |= {f"extra/{path}": view for path, view in extra.items() if path.split("/")[0] in EXTRA}
    return export_tensors(tensors, rules, target=f"export for {name}", duplicates=True)


def _original(config: BLIPConfig) -> str:
    if config.shared_decoder:
        return "pretraining"
    if config.num_labels is not None:
        return "NLVR2" if config.num_images == 2 else "classification"
    if config.decoder is not None:
        return "captioning" if config.text is None else "question answering"
    if config.itm and config.projection_bias:
        return "retrieval"
    raise UserError("no .pth file of the authors holds this combination of parts")
