"""Training configurations of tasks, fitted to the checkpoint that is fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm.config import complete, load
from vlm.data.annotations import read_answer_list
from vlm.errors import UserError
from vlm.family import NO_PROCESSOR
from vlm.loading import OpenModel
from vlm.strict import plain
from vlm.tasks.settings import Task, moved

_INHERITED = ("dtype", "remat")
"""Fields of every tower that follow the run's precision, not the checkpoint's."""


def fitted(
    task: Task, opened: OpenModel, checkpoint: Path, folder: Path, data: str, answers: Path | None
) -> ConfigDict:
    """The configuration that `task.train` names, for this checkpoint.

    Sizes of the model, tokenizer and image settings are the checkpoint's; which parts there are, the head and
    everything else the variant's, then `task.changes`.

    Args:
      folder: that `task.train` is relative to.
      data: see `settings.moved`.
      answers: the list of answers that are the classes, if they are.

    Raises:
      UserError: no such variant, another family, a checkpoint without tokenizer.
    """
    assert task.train is not None
    name, colon, variant = task.train.partition(":")
    config = moved(plain(load(f"{folder / name}{colon}{variant}")), data)
    if config.get("family") != opened.family.name:
        raise UserError(f"{task.train} trains {config.get('family')}, the checkpoint is {opened.family.name}")
    if opened.processor_folder is None:
        raise UserError(f"{checkpoint} {NO_PROCESSOR}")
    config["model"] = _merged(_without(plain(opened.config), _INHERITED), config.get("model", {}))
    config["init"] = tuple({**entry, "path": str(checkpoint)} for entry in config.get("init", ()))
    config["processor"] = _processor(config.get("processor", {}), opened)
    config["eval"] = task.eval
    config = _merged(config, task.changes)
    if answers is not None:
        count = len(read_answer_list(str(answers)))
        classes = {"answers": str(answers), "num_answers": count}
        config = _merged(config, {"processor": classes, "model": {"classifier": {"num_labels": count}}})
    text = getattr(opened.config, "text", None)
    if text is not None:  # a smaller model's rows are shorter
        lengths = config.get("train", {}).get("text_lengths", ())
        config = _merged(config, {"train": {"text_lengths": tuple(n for n in lengths if n <= text.max_tokens)}})
    head = config["model"].get("classifier") or {}
    if config["processor"].get("num_labels") is not None and "num_labels" in head:
        config["processor"]["num_labels"] = head["num_labels"]
    result = complete(ConfigDict(config))
    result.lock()
    return result


def _processor(given: Mapping[str, Any], opened: OpenModel) -> dict[str, Any]:
    """The variant's settings, with the checkpoint's tokenizer and, where the variant has no own, its image size."""
    result = dict(given)
    if given.get("tokenizer") is not None:
        result["tokenizer"] = str(opened.processor_folder)
    vision, text = (getattr(opened.config, part, None) for part in ("vision", "text"))
    if vision is not None:
        result.setdefault("image", {"size": vision.image_size, "crop": None, "mode": "exact"})
        result.setdefault("patch_size", vision.patch_size)
    if text is not None:
        for name, default in (("max_length", 77), ("text_length", 512)):
            result[name] = min(result.get(name, default), text.max_tokens)
    return result


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without(item, names) for key, item in value.items() if key not in names}


def _merged(base: Any, change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, mapping by mapping."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result
