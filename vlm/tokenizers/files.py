"""Bounded reading of tokenizer files: their sizes are checked before anything is parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.errors import UserError

MAX_MODEL_BYTES = 64 * 2**20
MAX_JSON_BYTES = 128 * 2**20
MAX_CONFIG_BYTES = 8 * 2**20


def read_bytes(path: Path, limit: int) -> bytes:
    """Returns a file's content; raises `UserError` when it is not a file, is empty or larger than `limit`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: {path.stat().st_size} bytes, more than the limit of {limit}")
    if not data:
        raise UserError(f"{path}: the file is empty")
    return data


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Returns the JSON object in a file; raises `UserError` when it is not one."""
    return parse_json(read_bytes(path, limit), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Returns the JSON object in `data`; raises `UserError` naming `path` when it is not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_if_present(path: Path) -> dict[str, Any]:
    """Like `read_json`, but an absent file is an empty object."""
    return read_json(path) if path.is_file() else {}


def token_text(value: Any) -> str | None:
    """Returns the spelling of a token entry, which the files hold as a string or as {"content": string}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Returns {token: id} from added_tokens.json and the `added_tokens_decoder` of tokenizer_config.json."""
    tokens: dict[str, int] = {}
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{folder}: added_tokens_decoder must be an object")
    entries = [(token_text(value), key) for key, value in decoder.items()]
    entries += list(read_json_if_present(folder / "added_tokens.json").items())
    for token, id_ in entries:
        if not token or not str(id_).isdigit() or len(str(id_)) > 9:
            raise UserError(f"{folder}: added token {token!r} has the id {id_!r}")
        if tokens.setdefault(token, int(id_)) != int(id_):
            raise UserError(f"{folder}: added token {token!r} has two ids, {tokens[token]} and {id_}")
    return tokens
