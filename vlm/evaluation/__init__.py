"""Evaluation: zero-shot classification, image-text retrieval, linear probe, embedding extraction.

    config.eval = {
        "imagenet_zh": {"kind": "zero_shot", "data": {source}, "classnames": FILE, "templates": FILE, "language": "zh"},
        "flickr30k": {"kind": "retrieval", "data": {source}, "captions": 5},
        "pets_probe": {"kind": "linear_probe", "train": {source}, "data": {source}},
        "embeddings": {"kind": "embeddings", "data": {source}, "text": "text"},
    }

`run` is what train.py and eval.py call. The mathematics of the metrics is in `classification` and `retrieval`, pure
functions of NumPy arrays; `embed` runs the model over all devices and hosts.
"""

from __future__ import annotations

from vlm.evaluation.results import check_output
from vlm.evaluation.runner import KINDS, Plan, prepare, run

__all__ = ["KINDS", "Plan", "check_output", "prepare", "run"]
