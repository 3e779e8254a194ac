"""Reading a configuration: a file and its overrides in, one frozen dataclass out; anything unknown is refused.

    --config=configs/altclip.py:tiny --config.optimizer.lr=1e-4 --config.data.sources[0].path=/data/cc3m

A `.py` configuration is a program and is executed; read it before you run it. A `.json` one is only parsed. What a
configuration may hold is described in `vlm.schema`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import inspect
import json
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from vlm import schema
from vlm.errors import Parser, UserError, did_you_mean
from vlm.strict import build, plain, unique_keys

__all__ = [
    "build",
    "command_line",
    "complete",
    "config_hash",
    "diff",
    "load",
    "parse_command",
    "parse_config_flag",
    "to_json",
]


# ---------------------------------------------------------------------------------------------- the command line


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser with `--config`; pass it to `parse_command` after adding the command's own options."""
    parser = Parser(description=description)
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help="a .py file with get_config(ARG), which is executed, or a .json file; "
        "override any key with --config.section.key=VALUE",
    )
    return parser


def parse_command(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, unread: Mapping[str, str] | None = None
) -> tuple[argparse.Namespace, ConfigDict | None]:
    """Parses a command line; the config is None when `--config` was not given.

    Args:
      unread: sections of the configuration that the command does not read, and why. To override them is an error.

    Raises:
      UserError: an unknown option, or anything `parse_config_flag` refuses.
    """
    options, rest = parser.parse_known_args(argv)
    overrides = _join_values(rest)
    for argument in overrides:
        if not re.match(r"--(no)?config\.", argument):
            known = [name for action in parser._actions for name in action.option_strings]
            raise UserError(f"unknown argument {argument}{did_you_mean(argument.split('=')[0], known)}")
        flag, section = argument.split("=")[0], re.split(r"[.=\[]", argument)[1]
        if section in (unread or {}):
            raise UserError(f"{flag} would change nothing: {(unread or {})[section]}")
    if options.config is None:
        if overrides:
            raise UserError(f"{overrides[0]} needs --config=FILE")
        return options, None
    return options, parse_config_flag(options.config, overrides)


def _join_values(arguments: Sequence[str]) -> list[str]:
    """`--config.a.b 1` is `--config.a.b=1`."""
    joined: list[str] = []
    for argument in arguments:
        takes_value = joined and joined[-1].startswith("--config.") and "=" not in joined[-1]
        if takes_value and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def parse_config_flag(value: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `FILE[:ARG]`, fills in the schema's defaults and applies `--config.a.b=value` overrides.

    Raises:
      UserError: a missing or failing file, an unknown key, a value of the wrong type, a list.
    """
    config = complete(load(value))
    config.lock()
    for argument in overrides:
        _override(config, argument)
    _refuse_lists(config, "config")
    return config


def load(value: str) -> ConfigDict:
    """The configuration of `FILE[:ARG]` as the file gives it."""
    name, _, argument = value.partition(":")
    path = pathlib.Path(name)
    if path.suffix not in (".py", ".json"):
        raise UserError(f"--config: expected a .py or .json file, found {name!r}")
    if not path.is_file():
        raise UserError(f"--config: no such file: {name}")
    if path.suffix == ".json":
        if argument:
            raise UserError(f"--config: a .json file takes no argument, found {argument!r}")
        return _load_json(path)
    return _load_program(path, argument)


def _load_json(path: pathlib.Path) -> ConfigDict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), **_STRICT)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON configuration: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return ConfigDict(_tuples(content))


def _refuse_constant(name: str) -> typing.NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_STRICT: dict[str, Any] = {"parse_constant": _refuse_constant, "object_pairs_hook": unique_keys}


def _tuples(value: Any) -> Any:
    """JSON has no tuples, configurations no lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _load_program(path: pathlib.Path, argument: str) -> ConfigDict:
    module = types.ModuleType("config")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)  # noqa: S102 - a config is a program
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"{path}: expected a function get_config, found none")
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(f"{path}: get_config takes no argument, found {argument!r}")
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config must return a ConfigDict, found {type(config).__name__}")
    return config


# ------------------------------------------------------------------------------------------- defaults, overrides


def complete(config: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """`config` with every key of the schema that it leaves out, so that each can be overridden and is recorded."""
    return _complete(schema.Config, plain(config))


def _complete(cls: Any, given: Mapping[str, Any]) -> ConfigDict:
    hints, result = typing.get_type_hints(cls), dict(given)
    for field in dataclasses.fields(cls):
        name, hint = field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            section = given.get(name, {})
            result[name] = _complete(hint, section) if isinstance(section, Mapping) else section
        elif name not in result:
            if field.default is not dataclasses.MISSING:
                result[name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                result[name] = plain(field.default_factory())
        if name in result and result[name] is None:  # a typed hole: an override is parsed as the right type
            kind = next(kind for kind in (*typing.get_args(hint), Any) if kind is not types.NoneType)
            result[name] = config_dict.placeholder(typing.get_origin(kind) or kind)
    return ConfigDict(result)


def _override(config: ConfigDict, argument: str) -> None:
    """Applies one `--config.a.b=value`; `config_flags` parses it by the type of the value it replaces."""
    path, equals, text = argument.partition("=")
    keys = re.sub(r"\[(\d+)\]", r".\1", path.split("config.", 1)[1]).split(".")
    if "" in keys:
        raise UserError(f"{argument}: expected --config.section.key=value")
    parent: Any = config
    for depth, key in enumerate(keys):
        if isinstance(parent, tuple) and key.isdigit() and int(key) < len(parent):
            child = parent[int(key)]
        elif isinstance(parent, (ConfigDict, dict)) and key in parent:
            child = parent[key]
        elif isinstance(parent, (ConfigDict, dict)) and _is_free(keys[:depth]):
            return _set(parent, keys[depth:], _literal(text))
        else:
            where = ".".join(["config", *keys[: depth + 1]])
            choices = parent.keys() if isinstance(parent, (ConfigDict, dict)) else ()
            raise UserError(f"{where} does not exist{did_you_mean(key, choices)}")
        if depth < len(keys) - 1:
            parent = child
    if equals and text == "None":
        return _set(parent, keys[-1:], None)
    if child is None and not _typed(parent, keys[-1]):
        return _set(parent, keys[-1:], _literal(text))
    _parse_typed(config, argument, child)


# Sections whose keys the schema does not know; their owners check them when they build their settings.
_FREE = tuple(
    f.name
    for f in dataclasses.fields(schema.Config)
    if not dataclasses.is_dataclass(typing.get_type_hints(schema.Config)[f.name]) and f.name not in ("family", "remat")
)


def _is_free(section: Sequence[str]) -> bool:
    """Whether a section may hold keys that neither the schema nor the file names."""
    return bool(section) and (section[0] in _FREE or (section[:2] == ["data", "sources"] and len(section) > 2))


def _typed(parent: Any, key: str) -> bool:
    return isinstance(parent, ConfigDict) and parent.get_type(key) is not types.NoneType


def _set(parent: Any, keys: Sequence[str], value: Any) -> None:
    for key in reversed(keys[1:]):
        value = {key: value}
    if not isinstance(parent, ConfigDict):
        parent[keys[0]] = value
        return
    with parent.unlocked(), parent.ignore_type():
        parent[keys[0]] = ConfigDict(value) if isinstance(value, dict) else value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _parse_typed(config: ConfigDict, argument: str, current: Any) -> None:
    values = flags.FlagValues()
    arguments = ["", argument]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=False, sys_argv=arguments)
        values(arguments)
    except (flags.Error, ValueError, TypeError, SyntaxError) as error:
        name, _, text = argument.partition("=")
        expected = type(current).__name__ if current is not None else "another type"
        raise UserError(f"{name.lstrip('-')}: expected {expected}, found {text!r} ({error})") from None


def _refuse_lists(value: Any, path: str) -> None:
    if isinstance(value, list):
        raise UserError(f"{path} is a list; write a tuple")
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, (ConfigDict, dict)):
        items = ((f".{key}", item) for key, item in value.items())
    elif isinstance(value, tuple):
        items = ((f"[{index}]", item) for index, item in enumerate(value))
    for key, item in items:
        _refuse_lists(item, f"{path}{key}")


# ------------------------------------------------------------------------------------- recording and comparing


def to_json(config: Any) -> str:
    """A configuration (ConfigDict, mapping or dataclass) as JSON that `load` reads back; keys are sorted."""
    return json.dumps(plain(config), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def config_hash(config: Any) -> str:
    """SHA-256 of the JSON form: equal for equal configurations, whatever wrote them."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def diff(old: Any, new: Any) -> list[str]:
    """What differs between two configurations, one line per key: `optimizer.lr: 0.001 -> 0.002`."""
    before, after = _leaves(json.loads(to_json(old))), _leaves(json.loads(to_json(new)))
    missing = object()
    lines = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key, missing), after.get(key, missing)
        if a != b:
            lines.append(f"{key}: {'absent' if a is missing else repr(a)} -> {'absent' if b is missing else repr(b)}")
    return lines


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = {f"{path}.{key}" if path else key: item for key, item in value.items()}
    elif isinstance(value, list) and value:
        parts = {f"{path}[{index}]": item for index, item in enumerate(value)}
    else:
        return {path: value}
    return {leaf: item for key, part in parts.items() for leaf, item in _leaves(part, key).items()}
