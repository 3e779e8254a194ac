"""What the families' readers of Hugging Face's config.json share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vlm.errors import UserError
from vlm.strict import build, plain
from vlm.tokenizers.files import read_json

Json = Mapping[str, Any]
T = TypeVar("T")

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu"}
_ACTIVATIONS |= {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
TO_HF = {ours: foreign for foreign, ours in _ACTIVATIONS.items()}
"""Our name of an activation function -> Hugging Face's."""


def config_beside(path: Path) -> dict[str, Any]:
    """config.json or open_clip_config.json of a folder, or of the folder that a weight file lies in; {} without."""
    folder = path if path.is_dir() else path.parent
    for name in ("config.json", "open_clip_config.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def activation(name: Any) -> str:
    """Our name of an activation function.

    Raises:
        UserError: an unknown one.
    """
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UserError(f"config.json: hidden_act: expected one of {', '.join(_ACTIVATIONS)}, found {name!r}")
    return _ACTIVATIONS[name]


def square(value: Any, name: str) -> Any:
    """The side of a size given as one number or as a pair of equal ones.

    Raises:
        UserError: they differ.
    """
    if isinstance(value, list) and len(set(value)) != 1:
        raise UserError(f"config.json: vision {name}: expected a square, found {value}")
    return value[0] if isinstance(value, list) else value


def check_numbers(section: Mapping[str, Any], where: str) -> None:
    """Refuses sizes below one and rates that are no numbers before anything is computed with them.

    Raises:
        UserError: one of them is.
    """
    for name, value in section.items():
        least = 0 if name.endswith(("_rate", "_eps", "_id")) else 1
        if type(value) in (int, float) and not least <= value < 2**31:
            raise UserError(f"config.{where}.{name}: expected a number of at least {least}, found {value}")


def mapping(config: Json, key: str) -> Json | None:
    """A nested section; None where it is absent or null.

    Raises:
        UserError: something else stands there.
    """
    value = config.get(key)
    if not isinstance(value, Mapping | None):
        raise UserError(f"config.json: {key}: expected a mapping, found {type(value).__name__}")
    return value


def merged(config: Json, part: str, defaults: Json, notes: list[str], label: str = "") -> dict[str, Any]:
    """One part's settings as transformers merges them.

    `<part>_config` is completed with the class defaults. A `<part>_config_dict` (of old files, often empty) is
    completed with the class defaults too, and then overrides the former.

    Args:
        notes: receives a line naming every value that is overridden.
        label: begins that line.

    Raises:
        UserError: one of them is no mapping.
    """
    nested, complete = (mapping(config, f"{part}_config{end}") for end in ("", "_dict"))
    section = {**defaults, **(nested or {})}
    if complete is not None:
        winning = {**defaults, **{key: complete[key] for key in defaults if key in complete}}
        changed = [f"{key} {section[key]} -> {winning[key]}" for key in defaults if section[key] != winning[key]]
        if changed:
            notes.append(f"{label}{part}_config_dict overrides {part}_config: {', '.join(changed)}")
        section |= winning
    return section


def override(parts: dict[str, Any], overrides: Json) -> None:
    """Sets "text.num_heads": value pairs in nested settings.

    Raises:
        UserError: a section that these settings lack.
    """
    for name, value in overrides.items():
        section, _, field = name.rpartition(".")
        if section and not isinstance(parts.get(section), dict):
            raise UserError(f"override {name}: this checkpoint has no {section!r} section")
        (parts[section] if section else parts)[field] = value


def replaced(config: T, overrides: Json, weights: Any) -> T:
    """The architecture of a checkpoint of vlm's own with other values of fields that decide on no parameter.

    Args:
        weights: the family's module of tables; its FREE, if it has some, names those fields.

    Raises:
        UserError: another field, or a value that is none of its type.
    """
    free = getattr(weights, "FREE", ())
    if bound := [name for name in overrides if name not in free]:
        allowed = f" (allowed: {', '.join(free)})" if free else ""
        raise UserError(f"override {bound[0]}: only of a foreign checkpoint; this is one of vlm's own{allowed}")
    return build(type(config), plain(config) | dict(overrides), "model") if overrides else config
