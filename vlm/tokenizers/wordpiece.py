"""BERT's WordPiece from a vocab.txt, built on the `tokenizers` library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from vlm.errors import UserError
from vlm.tokenizers.tokenizer_json import LibraryTokenizer, add_tokens, call_library

_SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


def bert_tokenizer(
    vocabulary: bytes,
    path: Path,
    config: Mapping[str, Any] | None = None,
    added: Mapping[str, int] | None = None,
    *,
    pad_id: int | None = None,
) -> LibraryTokenizer:
    """Builds BERT's tokenizer: rows are `[CLS] a [SEP]`, pairs `[CLS] a [SEP] b [SEP]` with token types 0 and 1.

    Args:
        vocabulary: content of vocab.txt, one token per line, the line number is the id.
        path: named in errors.
        config: tokenizer_config.json; `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` are
            obeyed. Without `do_lower_case` the vocabulary tells: a cased one has many capital letters.
        added: further special tokens and their ids, such as BLIP's `[DEC]` and `[ENC]`.
        pad_id: overrides `[PAD]`.
    """
    vocab = parse_vocabulary(vocabulary, path)
    own = {f"{role}_token": token for role, token in _SPECIAL.items() if token in vocab}
    settings: dict[str, Any] = own | dict(config or {})
    lower = settings.get("do_lower_case", not _is_cased(vocab))
    model = models.WordPiece(vocab, unk_token=_SPECIAL["unk"], max_input_chars_per_word=100)
    backend = call_library(path, lambda: tokenizers.Tokenizer(model))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(lower),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    ends = (("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    backend.post_processor = processors.BertProcessing(*ends)
    add_tokens(backend, {token: vocab[token] for token in _SPECIAL.values() if token in vocab}, path)
    add_tokens(backend, added or {}, path)
    settings = {"tokenizer_class": "BertTokenizer", **settings, "do_lower_case": bool(lower)}
    return LibraryTokenizer(backend, settings, pad_id=pad_id)


def parse_vocabulary(data: bytes, path: Path) -> dict[str, int]:
    """Returns {token: line number}; raises `UserError` for what is not a BERT vocabulary."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    lines = text.removesuffix("\n").split("\n")  # some tokens are other line separators
    vocab = {line.removesuffix("\r"): id_ for id_, line in enumerate(lines)}
    missing = [token for role, token in _SPECIAL.items() if token not in vocab and role != "mask"]
    if missing:
        raise UserError(f"{path}: not a BERT vocabulary, it lacks {', '.join(missing)}")
    return vocab


def _is_cased(vocab: Mapping[str, int]) -> bool:
    capitals = sum(bool(re.match(r"[A-Z]", token)) for token in vocab)
    return capitals > len(vocab) / 100
