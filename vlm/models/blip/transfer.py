"""One BLIP model from another: which parameters of a (pre)trained model a task's model starts from.

==============  ===========================================  ====================================================
task            from a pretraining model                     in no source (random, on request only)
==============  ===========================================  ====================================================
caption         decoder (with its own self-attention)
retrieval       encoder, projections, matching head,
                teacher and queues
vqa             encoder, and the decoder as a second stack   the decoder's cross-attention keys and values, if image
                                                             and text widths differ: it reads the question's states
nlvr            encoder, its cross-attention twice           the upper layers' merging maps, the classifier
classification  encoder                                      the classifier
==============  ===========================================  ====================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm.convert.layouts import Imported
from vlm.convert.views import TensorView, from_array, narrow
from vlm.errors import UserError
from vlm.fusion.med import MedConfig
from vlm.models.blip.config import VIT, BLIPConfig
from vlm.tree import listing

TASKS = ("caption", "retrieval", "vqa", "nlvr", "classification")
_TEMPERATURE = 0.07

Shapes = Callable[[BLIPConfig], Mapping[str, Any]]


def to_task(
    source: Imported, task: str, *, shapes: Shapes, num_labels: int | None = None, seed: int | None = None
) -> Imported:
    """Returns the model that a task starts from; lazy, like the source.

    Args:
        source: any BLIP model.
        task: one of `TASKS`.
        shapes: (architecture) -> anything with a `shape` by parameter path.
        num_labels: classes, for "classification".
        seed: initialises what the source lacks: kernels N(0, 0.02), biases zero, norms one, temperature 0.07.

    Raises:
        UserError: an unknown task; the source lacks parameters and there is no seed (all are listed).
    """
    config = _architecture(source.config, task, num_labels)
    needed = shapes(config)
    given = _candidates(source, config)
    fitting = {path: given[path] for path, leaf in needed.items() if _fits(given.get(path), leaf)}
    missing = [path for path in needed if path not in fitting]
    if missing and seed is None:
        raise UserError(
            f"--task={task}: {source.layout} lacks {len(missing)} parameters, which would start random: "
            f"{listing(missing)}; --random initialises them"
        )
    notes = list(source.notes)
    rng = np.random.default_rng(seed)
    for path in missing:
        fitting[path] = from_array(initial(path, needed[path].shape, rng))
        notes.append(f"initialised {path} {list(needed[path].shape)} from seed {seed}: the source has none that fits")
    extra = dict(source.extra) if task == "retrieval" else {}
    if source.config.shared_decoder:  # a new run starts at the beginning of the queue
        extra.pop("queue_index", None)
    gone = sorted({path.split("/")[0] for path in source.extra} - {path.split("/")[0] for path in extra})
    if gone:
        notes.append(f"left out of the training state: {', '.join(gone)}")
    params = {path: fitting[path] for path in needed}
    return Imported(config, params, f"{source.layout}, for {task}", notes, extra)


def _fits(view: TensorView | None, leaf: Any) -> bool:
    return view is not None and view.shape == tuple(leaf.shape)


def initial(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A new parameter: kernels N(0, 0.02), biases zero, norms one, the temperature 0.07."""
    kind = path.rpartition("/")[2]
    if kind in ("kernel", "embedding", "class_embedding", "position_embedding"):
        return rng.normal(0.0, 0.02, shape).astype(np.float32)
    value = _TEMPERATURE if kind == "temperature" else 1.0 if kind == "scale" else 0.0
    return np.full(shape, value, np.float32)


def _architecture(source: BLIPConfig, task: str, num_labels: int | None) -> BLIPConfig:
    stack = source.text or source.decoder
    if source.vision is None or stack is None:
        raise UserError(f"--task={task}: the source has no {'vision tower' if stack else 'text stack'}")
    text = dataclasses.replace(stack, context_size=source.vision.hidden_size, pooler=False)
    parts: dict[str, Any] = {"text": text, "decoder": None, "shared_decoder": False, "projection_dim": None}
    parts["vision"] = dataclasses.replace(source.vision, output_norm=VIT.output_norm)  # HF's BlipModel has another
    parts |= {"projection_bias": True, "itm": False, "temperature": None, "logit_scale_init": None}
    parts |= {"num_labels": None, "num_images": 1, "average_layers": None, "tied_lm_head": True}
    if task == "caption":
        parts |= {"text": None, "decoder": _decoder(source, source.vision.hidden_size)}
    elif task == "vqa":
        parts["decoder"] = _decoder(source, text.hidden_size)
    elif task == "retrieval":
        parts |= {"projection_dim": source.projection_dim or 256, "itm": True, "temperature": _TEMPERATURE}
    elif task == "nlvr":
        parts |= {"num_labels": 2, "num_images": 2, "average_layers": source.average_layers}
    elif task == "classification":
        if num_labels is None:
            raise UserError("--task=classification: give the number of classes with --labels")
        parts["num_labels"] = num_labels
    else:
        raise UserError(f"--task: expected one of {', '.join(TASKS)}, found {task!r}")
    if task in ("caption", "vqa") and source.generative is not None:
        parts["tied_lm_head"] = source.tied_lm_head
    return dataclasses.replace(source, **parts)


def _decoder(source: BLIPConfig, context_size: int) -> MedConfig:
    stack = source.generative or source.text
    assert stack is not None
    return dataclasses.replace(stack, context_size=context_size, pooler=False)


def _candidates(source: Imported, config: BLIPConfig) -> dict[str, TensorView]:
    """Every parameter of the source under the path or paths that it may have in the new model."""
    found: dict[str, TensorView] = {}
    for path, view in source.params.items():
        if source.config.shared_decoder and config.decoder is not None and path.startswith("text/"):
            own = path.replace("/decoder_attention", "/attention")
            if own != path or not path.startswith(("text/layers/attention/", "text/layers/attention_norm/")):
                found["decoder/" + own.removeprefix("text/")] = view
        if path.startswith("text/layers/") and config.num_images == 2:
            found |= _twins(path, view, config)
        found[path] = view
    return found


def _twins(path: str, view: TensorView, config: BLIPConfig) -> dict[str, TensorView]:
    """A stack's layers as NLVR2's two stacks; cross-attention once for each image."""
    average = view.shape[0] // 2 if config.average_layers is None else config.average_layers
    parts = {"average_layers": (0, average), "merge_layers": (average, view.shape[0] - average)}
    names = [path]
    if "/cross_attention/" in path:
        names = [path.replace("/cross_attention/", f"/cross_attention_{i}/") for i in (0, 1)]
    return {
        name.replace("text/layers/", f"text/{part}/"): narrow(view, start, count)
        for name in names
        for part, (start, count) in parts.items()
        if count
    }
