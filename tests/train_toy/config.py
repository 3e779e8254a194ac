"""A run of the toy family; makes the family known, because a configuration is a program."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

FOLDER = Path(__file__).parent


def get_config(data: str = "") -> ConfigDict:
    """`data`: a JSONL file."""
    sys.path.insert(0, str(FOLDER))
    import vlm.models

    vlm.models.FAMILIES["toy"] = "toy_family"
    return ConfigDict(
        {
            "family": "toy",
            "processor": {"size": 4},
            "data": {
                "sources": ({"kind": "jsonl", "path": data},),
                "batch_size": 8,
                "num_workers": 1,
            },
            "optimizer": {"lr": 1e-2, "schedule": {"name": "constant"}, "ema_decay": 0.9},
            "train": {"steps": 6, "log_every": 2, "checkpoint_every": 2},
        }
    )
