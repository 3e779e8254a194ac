"""Evaluation: zero-shot, retrieval, linear probe, embeddings, captions, answers, true or false, classifiers, losses.

    config.eval = {
        "imagenet_zh": {"kind": "zero_shot", "data": {source}, "classnames": FILE, "templates": FILE, "language": "zh"},
        "flickr30k": {"kind": "retrieval", "data": {source}, "captions": 5},
        "pets_probe": {"kind": "linear_probe", "train": {source}, "data": {source}, "features": "class_token"},
        "embeddings": {"kind": "embeddings", "data": {source}, "text": "text"},
        "coco": {"kind": "captions", "data": {source}},
        "nocaps": {"kind": "captions", "data": {source}, "preset": "nocaps", "domain": "domain"},
        "vqa": {"kind": "vqa", "data": {source}, "mode": "rank", "answer_list": FILE},
        "coco_retrieval": {"kind": "matching_retrieval", "data": {source}, "text": "caption", "shortlist": 256},
        "nlvr2": {"kind": "nlvr2", "data": {source}},
        "visdial": {"kind": "visual_dialog", "data": {"kind": "visdial", "path": FILE, "annotations": FILE}},
        "mrpc": {"kind": "classification", "data": {source}, "text_pair": "text_pair", "metrics": ("accuracy", "f1")},
        "held_out": {"kind": "losses", "data": {source}, "loss": {"max_masked_tokens": 128}},
    }

`run` is what train.py and eval.py call. The mathematics of the metrics is in `classification`, `retrieval` and
`metrics`, pure functions of strings and NumPy arrays; `embed` runs the model over all devices and hosts.

Importing the package imports no jax, so that the metrics can be had without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.evaluation.results import check_output
    from vlm.evaluation.runner import KINDS, Plan, check, prepare, run

__all__ = ["KINDS", "Plan", "check", "check_output", "prepare", "run"]

_RUNNER = "vlm.evaluation.runner"
_LAZY = dict.fromkeys(("KINDS", "Plan", "check", "prepare", "run"), _RUNNER) | {
    "check_output": "vlm.evaluation.results"
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vlm.evaluation' has no attribute {name!r}")
