"""Strict construction of frozen dataclasses from configuration sections: every key must exist, every type must fit."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from vlm.errors import UserError, did_you_mean, nearest

T = TypeVar("T")
Inherited = Mapping[str, Any]


def plain(config: Any) -> Any:
    """ConfigDicts and dataclasses, at any depth, as plain dicts; tuples stay."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    return tuple(map(plain, config)) if isinstance(config, tuple) else config


def build(cls: type[T], config: Mapping[str, Any] | ConfigDict, path: str, inherited: Inherited | None = None) -> T:
    """Makes the (nested) dataclass `cls` from a section; every key must exist and have the annotated type.

    Args:
      path: where the section stands in the configuration ("model"; "" for the whole), for messages.
      inherited: values for fields of these names, at any depth, that the section does not set itself.

    Raises:
      UserError: an unknown or missing key, a value of another type, or one that the class refuses.
    """
    given = plain(config)
    _check_values(given, path)
    return _build(cls, given, path, inherited or {}, None)


def replace_everywhere(config: Any, name: str, value: Any) -> Any:
    """A dataclass with every field of this name changed, at any depth."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    nested = {n: replace_everywhere(v, name, value) for n, v in values.items() if dataclasses.is_dataclass(v)}
    return dataclasses.replace(config, **nested, **({name: value} if name in values else {}))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads` that refuses a key given twice, of which it would drop the first."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return result


def at_least(bound: float, settings: Any, *names: str) -> None:
    """For `__post_init__`: raises ValueError where a field that is not None is below `bound`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}: expected at least {bound}, found {value}")


def fraction(settings: Any, *names: str) -> None:
    """For `__post_init__`: raises ValueError where a field that is not None is not between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a value from 0 to 1, found {value}")


def unused(settings: Any, reader: str, *names: str) -> None:
    """For `__post_init__`: raises ValueError where a field that `reader` does not read is not its default."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in names and value != _default(field):
            expected = f"{reader} does not read it; expected {_default(field)!r}"
            raise ValueError(f"{field.name}: {expected}, found {value!r}")


def _check_values(value: Any, where: str) -> None:
    """Refuses what JSON cannot hold, at any depth: a run could neither record nor compare it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_values(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            _check_values(item, f"{where}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{_at(where)}: expected a finite number, found {value}")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise UserError(f"{_at(where)}: expected a number, text, tuple or mapping, found {value!r}")


def _build(cls: type[T], given: Mapping[str, Any], path: str, inherited: Inherited, base: Any) -> T:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # pyright: ignore[reportArgumentType]
    for key in given:
        if key not in fields:
            raise UserError(f"{_at(path, str(key))} does not exist{did_you_mean(str(key), fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        where, hint = _at(path, name), hints[name]
        default = getattr(base, name) if base is not None else _default(field)
        if name in given and isinstance(given[name], Mapping) and dataclasses.is_dataclass(default):
            values[name] = _build(type(default), given[name], where, inherited, default)  # pyright: ignore[reportArgumentType]
        elif name in given:
            values[name] = _convert(given[name], hint, where, inherited)
        elif name in inherited:
            values[name] = inherited[name]
        elif dataclasses.is_dataclass(default):
            values[name] = _build(type(default), {}, where, inherited, default)  # pyright: ignore[reportArgumentType]
        elif default is dataclasses.MISSING:
            raise UserError(f"{where} is required")
        else:
            values[name] = default
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{_at(path)}: {error}") from error


def _at(*path: str) -> str:
    """`_at("model", "text")` is "config.model.text"."""
    parts = [part for part in path if part]
    return ".".join(parts if parts and parts[0].startswith("config") else ["config", *parts])


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _convert(value: Any, hint: Any, where: str, inherited: Inherited) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, where, inherited)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        choices = ", ".join(map(repr, arguments))
        close = nearest(str(value), [choice for choice in arguments if isinstance(choice, str)])
        raise UserError(f"{where}: expected one of {choices}, found {value!r}{close}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, Mapping):
            return _build(hint, value, where, inherited, None)
    elif origin is tuple or hint is tuple:
        if isinstance(value, (tuple, list)):
            return _convert_tuple(value, hint, where, inherited)
    elif (origin or hint) in (dict, collections.abc.Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int or hint is bool:
        if type(value) is hint:
            return value
    elif isinstance(value, typing.cast(type, origin or hint)):
        return value
    raise UserError(f"{where}: expected {_describe(hint)}, found {value!r}")


def _convert_union(value: Any, hint: Any, where: str, inherited: Inherited) -> Any:
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    if len(kinds) == 1:
        return _convert(value, kinds[0], where, inherited)
    for kind in kinds:
        try:
            return _convert(value, kind, where, inherited)
        except UserError:
            continue
    raise UserError(f"{where}: expected {_describe(hint)}, found {value!r}")


def _convert_tuple(value: Sequence[Any], hint: Any, where: str, inherited: Inherited) -> tuple:
    kinds = typing.get_args(hint) or (Any, ...)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise UserError(f"{where}: expected {_describe(hint)}, found {len(value)} values")
    pairs = enumerate(zip(value, kinds, strict=True))
    return tuple(_convert(item, kind, f"{where}[{i}]", inherited) for i, (item, kind) in pairs)


def _describe(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or hint is dict or typing.get_origin(hint) is dict:
        return "a mapping"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
