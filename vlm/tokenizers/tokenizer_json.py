"""Any tokenizer that the `tokenizers` library can express: files called tokenizer.json, BERT, CLIP."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from vlm.errors import UserError
from vlm.manifest import write_atomically
from vlm.tokenizers.files import token_text
from vlm.tokenizers.tokenizer import Part, Template, Tokenizer

# Where neither a configuration nor the file itself names a token, these spellings are looked up in order.
_WELL_KNOWN = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "bos": ("<s>", "[CLS]", "<|startoftext|>", "<|begin_of_text|>", "<bos>"),
    "eos": ("</s>", "[SEP]", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
_STAND_INS = {"bos": "cls", "eos": "sep"}


class LibraryTokenizer(Tokenizer):
    """Wraps a `tokenizers.Tokenizer`; its post-processor decides which special tokens stand where.

    Args:
        backend: the library's object. Its own truncation and padding settings are switched off.
        config: {"pad_token": "<pad>", ...} as in tokenizer_config.json; entries are strings or
            {"content": string}. Kept and written back by `save`.
        pad_id: overrides every other source.

    Raises:
        UserError: the configuration names a token that the vocabulary lacks.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None, *, pad_id: int | None = None
    ):
        self._backend = backend
        self._config = dict(config or {})
        own_padding = backend.padding
        backend.no_padding()
        backend.no_truncation()
        self.vocab_size = _vocab_size(backend)
        self.bos_id, self.eos_id = self._find("bos"), self._find("eos")
        self.unk_id, self.mask_id, self.pad_id = self._find("unk"), self._find("mask"), self._find("pad")
        if "pad_token" not in self._config and own_padding:
            self.pad_id = own_padding["pad_id"]
        self.pad_id = pad_id if pad_id is not None else self.pad_id
        if self.pad_id is not None and not 0 <= self.pad_id < self.vocab_size:
            raise UserError(f"pad_id {self.pad_id} is outside the vocabulary of {self.vocab_size}")
        self.single, self.pair = _template(backend, False), _template(backend, True)
        self.padding_side = self._side("padding_side")
        self.truncation_side = self._side("truncation_side")

    def _find(self, role: str) -> int | None:
        for name in filter(None, (role, _STAND_INS.get(role))):
            token = token_text(self._config.get(f"{name}_token"))
            if token is not None:
                id_ = self._backend.token_to_id(token)
                if id_ is None:
                    raise UserError(f"the vocabulary lacks the {name} token {token!r}")
                return id_
        found = (self._backend.token_to_id(token) for token in _WELL_KNOWN[role])
        return next((id_ for id_ in found if id_ is not None), None)

    def _side(self, key: str) -> str:
        side = self._config.get(key, "right")
        if side not in ("left", "right"):
            raise UserError(f"{key} is 'left' or 'right', found {side!r}")
        return side

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text without the surrounding special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids; raises `UserError` for an id outside the vocabulary."""
        ids = [int(id_) for id_ in ids]
        wrong = [id_ for id_ in ids if not 0 <= id_ < self.vocab_size]
        if wrong:
            raise UserError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        text = self._backend.decode(ids, skip_special_tokens=skip_special)
        # The library's byte-level decoder leaves CLIP's word-end marks in the text.
        suffix = getattr(self._backend.model, "end_of_word_suffix", None)
        return text.replace(suffix, " ").strip() if suffix else text

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its exact spelling, or None."""
        return self._backend.token_to_id(token)

    def continuations(self) -> np.ndarray:
        """bool[vocab_size]: which tokens go on with a word, by WordPiece's spelling "##…"."""
        result = np.zeros(self.vocab_size, bool)
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        result[[id_ for token, id_ in vocabulary.items() if token.startswith("##")]] = True
        return result

    def extended(self, tokens: Iterable[str]) -> LibraryTokenizer:
        """Returns a copy that also knows these special tokens; those that it lacks get the next ids in order."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        for token in tokens:
            backend.add_special_tokens([token])
        return LibraryTokenizer(backend, self._config, pad_id=self.pad_id)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        ids = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "mask": self.mask_id}
        config |= {f"{role}_token": self._backend.id_to_token(id_) for role, id_ in ids.items() if id_ is not None}
        write_atomically(directory / "tokenizer.json", self._backend.to_str().encode())
        text = json.dumps(config, indent=1, ensure_ascii=False)
        write_atomically(directory / "tokenizer_config.json", text.encode())


def parse_backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """Parses the content of a tokenizer.json; raises `UserError` naming `path` when the library refuses it."""
    return call_library(path, lambda: tokenizers.Tokenizer.from_str(data.decode()))


def call_library(path: Path, build: Any) -> tokenizers.Tokenizer:
    """Runs `build()`; whatever the library raises about bad files, panics included, becomes a `UserError`."""
    try:
        return build()
    except BaseException as error:
        # Panics of the Rust code derive from BaseException and have no importable class.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise UserError(f"{path}: not a usable tokenizer ({error})") from None
        raise


def add_tokens(backend: tokenizers.Tokenizer, added: Mapping[str, int], folder: Path) -> None:
    """Adds special tokens in the order of their ids; those that the vocabulary knows must agree with it."""
    for token, id_ in sorted(added.items(), key=lambda item: item[1]):
        backend.add_special_tokens([token])
        if backend.token_to_id(token) != id_:
            found = backend.token_to_id(token)
            raise UserError(f"{folder}: added token {token!r} has the id {id_}, the vocabulary gives {found}")


def _vocab_size(backend: tokenizers.Tokenizer) -> int:
    """One more than the largest id, which exceeds the number of tokens where ids have gaps."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _template(backend: tokenizers.Tokenizer, pair: bool) -> Template:
    """Reads off, from a probe, where the post-processor puts special tokens."""
    words = itertools.chain(("x", "a", "1", "."), backend.get_vocab())
    probes = (backend.encode(word, add_special_tokens=False) for word in itertools.islice(words, 1000))
    first = next((probe for probe in probes if probe.ids), None)
    if first is None:
        raise UserError("the tokenizer finds no tokens in its own vocabulary")
    second = copy.copy(first)
    row = backend.post_process(first, second) if pair else backend.post_process(first)
    parts: list[tuple[Part, int]] = []
    seen = 0
    for id_, special, kind in zip(row.ids, row.special_tokens_mask, row.type_ids, strict=True):
        if special:
            parts.append((id_, kind))
            continue
        if seen in (0, len(first)):  # the first token of either text stands for the whole text
            parts.append(("B" if seen else "A", kind))
        seen += 1
    if seen != len(first) * (1 + pair):
        raise UserError("the tokenizer's post-processor does more than put special tokens around texts")
    return tuple(parts)
