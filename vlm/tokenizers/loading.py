"""Finds out which tokenizer a file or a folder holds, from the files and their content, and opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vlm.errors import UserError
from vlm.tokenizers.clip_bpe import START, clip_tokenizer, original_files, read_merges
from vlm.tokenizers.files import (
    MAX_JSON_BYTES,
    MAX_MODEL_BYTES,
    added_tokens,
    parse_json,
    read_bytes,
    read_json,
    read_json_if_present,
    token_text,
)
from vlm.tokenizers.spm import LlamaTokenizer, XLMRobertaTokenizer, has_byte_pieces, open_model, special_ids
from vlm.tokenizers.tokenizer import Tokenizer
from vlm.tokenizers.tokenizer_json import LibraryTokenizer, add_tokens, parse_backend
from vlm.tokenizers.wordpiece import bert_tokenizer

Layout = Literal["xlm-roberta", "llama"]
_MODEL_FILES = ("sentencepiece.bpe.model", "tokenizer.model", "spiece.model")
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
FILE_NAMES = (*_MODEL_FILES, "tokenizer.json", "vocab.txt", "vocab.json", _CLIP_FILE)
"""Files that show that a folder holds a tokenizer."""
_LAYOUT_OF_CLASS: dict[str, Layout] = {"XLMRobertaTokenizer": "xlm-roberta", "LlamaTokenizer": "llama"}
_LAYOUT_OF_MODEL: dict[str, Layout] = {
    **dict.fromkeys(("altclip", "xlm-roberta", "xlm-roberta-xl"), "xlm-roberta"),
    **dict.fromkeys(("llama", "idefics", "llava", "vipllava"), "llama"),
}


def load(path: str | Path, *, layout: Layout | None = None, pad_id: int | None = None) -> Tokenizer:
    """Opens the tokenizer in a folder, or in one file.

    A folder is recognised by its files: a SentencePiece model, tokenizer.json, BERT's vocab.txt, CLIP's
    vocab.json with merges.txt or bpe_simple_vocab_16e6.txt.gz, in this order. Its tokenizer_config.json,
    special_tokens_map.json, added_tokens.json and config.json are read where they are. A single file is
    recognised by its content.

    Args:
        path: folder or file.
        layout: how ids follow from a SentencePiece model; by default told by the tokenizer class or the model
            type in the folder's configuration, else by the model's own special ids and byte pieces.
        pad_id: overrides the padding token (CLIP: 0 as OpenAI pads, instead of `<|endoftext|>`).

    Raises:
        UserError: nothing recognisable is there, a file is damaged or too large, or the files contradict one
            another.
    """
    path = Path(path)
    if layout not in (None, "xlm-roberta", "llama"):
        raise UserError(f"tokenizer layout {layout!r}; choose from xlm-roberta, llama")
    if path.is_dir():
        return _load_folder(path, layout, pad_id)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (expected a tokenizer)")
    return _load_file(path, layout, pad_id)


def _load_folder(folder: Path, layout: Layout | None, pad_id: int | None) -> Tokenizer:
    config = _folder_config(folder)
    added = added_tokens(folder, config)
    model = next((folder / name for name in _MODEL_FILES if (folder / name).is_file()), None)
    has_json = (folder / "tokenizer.json").is_file()
    if model is not None:
        layout = layout or _named_layout(folder, config)
        data = read_bytes(model, MAX_MODEL_BYTES)
        if layout or not has_json or _layout_of_ids(data):
            return _sentencepiece(data, model, layout, config, added, pad_id)
    if has_json:
        backend = parse_backend(read_bytes(folder / "tokenizer.json", MAX_JSON_BYTES), folder / "tokenizer.json")
        add_tokens(backend, {t: i for t, i in added.items() if backend.token_to_id(t) is None}, folder)
        return LibraryTokenizer(backend, config, pad_id=pad_id)
    if (folder / "vocab.txt").is_file():
        data = read_bytes(folder / "vocab.txt", MAX_MODEL_BYTES)
        return bert_tokenizer(data, folder / "vocab.txt", config, added, pad_id=pad_id)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _clip_pair_of_files(folder, config, pad_id)
    if (folder / _CLIP_FILE).is_file():
        return _load_file(folder / _CLIP_FILE, layout, pad_id)
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    raise UserError(
        f"{folder}: no tokenizer found; expected {_MODEL_FILES[0]}, {_MODEL_FILES[1]}, tokenizer.json, vocab.txt,"
        f" vocab.json with merges.txt, or {_CLIP_FILE}; found {names}"
    )


def _load_file(path: Path, layout: Layout | None, pad_id: int | None) -> Tokenizer:
    data = read_bytes(path, MAX_JSON_BYTES)
    if data.startswith(b"\x1f\x8b"):
        return clip_tokenizer(*original_files(data, path), path, pad_id=pad_id)
    if data.lstrip()[:1] == b"{":
        value = parse_json(data, path)
        if isinstance(value.get("model"), dict):
            return LibraryTokenizer(parse_backend(data, path), _clip_defaults(value), pad_id=pad_id)
        if START in value and (path.parent / "merges.txt").is_file():
            return _clip_pair_of_files(path.parent, {}, pad_id)
        raise UserError(f"{path}: JSON, but no tokenizer: expected the keys of a tokenizer.json or CLIP's vocab.json")
    if b"[UNK]" in data and b"[CLS]" in data and b"\x00" not in data:
        return bert_tokenizer(data, path, pad_id=pad_id)
    return _sentencepiece(data, path, layout, {}, {}, pad_id)


def _folder_config(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json overlaid with tokenizer_config.json."""
    tokens = read_json_if_present(folder / "special_tokens_map.json")
    config = read_json_if_present(folder / "tokenizer_config.json")
    tokens = {key: value for key, value in tokens.items() if key.endswith("_token")}
    return tokens | {key: value for key, value in config.items() if value is not None}


def _named_layout(folder: Path, config: dict[str, Any]) -> Layout | None:
    """The layout that the folder's configuration names, if it names one."""
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    model_type = read_json_if_present(folder / "config.json").get("model_type")
    return _LAYOUT_OF_CLASS.get(name) or _LAYOUT_OF_MODEL.get(str(model_type))


def _layout_of_ids(data: bytes) -> Layout | None:
    """The layout that fits a SentencePiece model's special ids and pieces."""
    model = open_model(data)
    if special_ids(model) != (0, 1, 2):
        return None
    return "llama" if has_byte_pieces(model) else "xlm-roberta"


def _sentencepiece(
    data: bytes,
    path: Path,
    layout: Layout | None,
    config: dict[str, Any],
    added: dict[str, int],
    pad_id: int | None,
) -> Tokenizer:
    try:
        layout = layout or _layout_of_ids(data)
        if layout is None:
            ids = "unk {}, bos {}, eos {}".format(*special_ids(open_model(data)))
            raise UserError(f"unknown SentencePiece layout, found {ids}; XLM-R and LLaMA have 0, 1, 2")
        if layout == "xlm-roberta":
            if pad_id not in (None, 1):
                raise UserError(f"XLM-R pads with id 1, not {pad_id}: positions are counted from it")
            return XLMRobertaTokenizer(data, added, parse_special=config.get("split_special_tokens") is False)
        ends = {"add_bos": config.get("add_bos_token", True), "add_eos": config.get("add_eos_token", False)}
        tokenizer = LlamaTokenizer(data, added, pad_id=pad_id, **{key: bool(value) for key, value in ends.items()})
        name = token_text(config.get("pad_token"))
        if pad_id is None and name not in (None, "<unk>"):
            tokenizer.pad_id = tokenizer.token_id(name)
            if tokenizer.pad_id is None:
                raise UserError(f"the vocabulary lacks the pad token {name!r}")
        return tokenizer
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _clip_pair_of_files(folder: Path, config: dict[str, Any], pad_id: int | None) -> Tokenizer:
    vocab = read_json(folder / "vocab.json", MAX_JSON_BYTES)
    if not all(isinstance(id_, int) for id_ in vocab.values()):
        raise UserError(f"{folder / 'vocab.json'}: expected token ids as integers")
    lines = read_bytes(folder / "merges.txt", MAX_MODEL_BYTES).decode(errors="replace").split("\n")
    merges = read_merges(lines, folder / "merges.txt")
    return clip_tokenizer(vocab, merges, folder / "vocab.json", config, pad_id=pad_id)


def _clip_defaults(value: dict[str, Any]) -> dict[str, Any]:
    """CLIP's tokenizer.json alone does not say that it pads with its end token."""
    model = value["model"]
    end = "<|endoftext|>"
    is_clip = model.get("end_of_word_suffix") == "</w>" and START in (model.get("vocab") or {})
    return {"pad_token": end, "unk_token": end} if is_clip else {}
