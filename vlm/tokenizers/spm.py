"""SentencePiece models in the two layouts that the published checkpoints use.

XLM-R (fairseq): the model's pieces are shifted by one to make room for `<pad>`; rows are `<s> text </s>`.
LLaMA: the model's own ids with byte fallback; rows start with `<s>` and have no end token.

Both follow SentencePiece itself, which made the ids that the original weights were trained on: a special token
that is spelled out in a text is text.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from vlm.errors import UserError
from vlm.manifest import write_atomically
from vlm.tokenizers.tokenizer import Template, Tokenizer

_XLMR_UNKNOWN = 3


class _SentencePiece(Tokenizer):
    """A SentencePiece model whose ids are shifted by a constant, plus tokens that it does not know.

    `_added` are spellings outside the model that are recognised in texts; `_special` are left out by `decode`.
    """

    file_name: str
    _added: dict[str, int]
    _special: dict[int, str]

    def __init__(self, model: bytes, offset: int, added: Mapping[str, int]):
        self._model = open_model(model)
        self._offset = offset
        self._set_added(added)

    def _set_added(self, added: Mapping[str, int]) -> None:
        self._added = dict(added)
        spellings = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, spellings))})") if spellings else None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text; every stretch between added tokens is encoded on its own."""
        if self._pattern is None:
            return self._pieces(text)
        ids: list[int] = []
        for part in self._pattern.split(text):
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids.extend(self._pieces(part))
        return ids

    def _pieces(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        if not self._offset:
            return ids
        unknown = self._model.unk_id()
        return [_XLMR_UNKNOWN if id_ == unknown else id_ + self._offset for id_ in ids]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids; raises `UserError` for an id outside the vocabulary."""
        names = {id_: token for token, id_ in self._added.items()} | self._special
        parts = []
        for known, run in itertools.groupby(map(int, ids), lambda id_: id_ in names):
            if known:
                parts += [names[id_] for id_ in run if not (skip_special and id_ in self._special)]
                continue
            pieces = [id_ - self._offset for id_ in run]
            wrong = [id_ for id_ in pieces if not 0 <= id_ < self._model.vocab_size()]
            if wrong:
                raise UserError(f"token id {wrong[0] + self._offset} is outside the vocabulary of {self.vocab_size}")
            parts.append(self._model.decode(pieces))
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a piece such as "▁the", of a special or of an added token, or None."""
        named = self._added | {spelling: id_ for id_, spelling in self._special.items()}
        if token in named:
            return named[token]
        id_ = self._model.piece_to_id(token)
        return None if id_ == self._model.unk_id() else id_ + self._offset

    def save(self, directory: str | Path) -> None:
        """Writes the model file, tokenizer_config.json and, where there are added tokens, added_tokens.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / self.file_name, self._model.serialized_model_proto())
        outside = {token: id_ for token, id_ in self._added.items() if id_ not in self._special}
        if outside:
            write_atomically(directory / "added_tokens.json", json.dumps(outside, indent=1).encode())
        config = json.dumps(self._config(), indent=1, ensure_ascii=False)
        write_atomically(directory / "tokenizer_config.json", config.encode())

    def _config(self) -> dict[str, Any]:
        raise NotImplementedError


class XLMRobertaTokenizer(_SentencePiece):
    """XLM-R: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the model's pieces shifted by one, `<mask>` last.

    Args:
        model: content of a SentencePiece file with unk 0, bos 1, eos 2.
        added: further tokens and their ids, recognised in texts.
        parse_special: recognise `<s>`, `</s>`, `<pad>`, `<unk>`, `<mask>` in texts too, as the Hugging Face
            class does; the original treats them as text.
    """

    file_name = "sentencepiece.bpe.model"

    def __init__(self, model: bytes, added: Mapping[str, int] | None = None, *, parse_special: bool = False):
        self.bos_id, self.pad_id, self.eos_id, self.unk_id = 0, 1, 2, _XLMR_UNKNOWN
        super().__init__(model, 1, {})
        ids = special_ids(self._model)
        if ids != (0, 1, 2):
            raise UserError(f"expected a SentencePiece model with unk, bos, eos = 0, 1, 2 for XLM-R, found {ids}")
        self.mask_id = self._model.vocab_size() + 1
        self._special = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", self.mask_id: "<mask>"}
        self._parse_special = parse_special
        outside = _check_added(added or {}, {token: id_ for id_, token in self._special.items()}, self.mask_id)
        self.vocab_size = max(self.mask_id, *outside.values()) + 1 if outside else self.mask_id + 1
        self._set_added(outside | ({t: i for i, t in self._special.items()} if parse_special else {}))
        self.single = ((0, 0), ("A", 0), (2, 0))
        self.pair = (*self.single, (2, 0), ("B", 0), (2, 0))

    def _config(self) -> dict[str, Any]:
        names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>"}
        tokens = {f"{role}_token": token for role, token in names.items()}
        split = {"split_special_tokens": False} if self._parse_special else {}
        return {"tokenizer_class": "XLMRobertaTokenizer", **tokens, "mask_token": "<mask>", **split}


class LlamaTokenizer(_SentencePiece):
    """LLaMA: the model's own ids, `<s>` in front, nothing behind, bytes for unknown characters.

    Args:
        model: content of a SentencePiece file.
        added: tokens beyond the model's vocabulary and their ids, recognised in texts. The text after one
            starts with the model's dummy space again, which is what the original weights saw.
        pad_id: by default the model's padding id, or `<unk>` where it has none.
        add_bos, add_eos: which special tokens a row gets.
    """

    file_name = "tokenizer.model"

    def __init__(
        self,
        model: bytes,
        added: Mapping[str, int] | None = None,
        *,
        pad_id: int | None = None,
        add_bos: bool = True,
        add_eos: bool = False,
    ):
        super().__init__(model, 0, {})
        self.unk_id, self.bos_id, self.eos_id = special_ids(self._model)
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError("expected a SentencePiece model with a bos and an eos piece for LLaMA")
        size = self._model.vocab_size()
        known = {self._model.id_to_piece(id_): id_ for id_ in range(size)} if added else {}
        self._set_added(_check_added(added or {}, known, size - 1))
        self.vocab_size = max([size - 1, *self._added.values()]) + 1
        own_pad = self._model.pad_id()
        self.pad_id = pad_id if pad_id is not None else own_pad if own_pad >= 0 else self.unk_id
        self._special = {id_: self._model.id_to_piece(id_) for id_ in range(size) if self._model.is_control(id_)}
        front: Template = ((self.bos_id, 0),) if add_bos else ()
        back: Template = ((self.eos_id, 0),) if add_eos else ()
        self.single = (*front, ("A", 0), *back)
        self.pair = (*self.single, *front, ("B", 0), *back)
        self._ends = {"add_bos_token": add_bos, "add_eos_token": add_eos}

    def _config(self) -> dict[str, Any]:
        pad_id = int(self.pad_id or 0)
        names = {id_: token for token, id_ in self._added.items()}
        pad = names.get(pad_id) or self._model.id_to_piece(pad_id)
        return {"tokenizer_class": "LlamaTokenizer", "pad_token": pad, "legacy": True, **self._ends}


def open_model(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Parses a SentencePiece file's content; raises `UserError` when it is not one."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if model and processor.LoadFromSerializedProto(model):
            return processor
    except RuntimeError:
        pass
    raise UserError("not a SentencePiece model")


def special_ids(processor: sentencepiece.SentencePieceProcessor) -> tuple[int, int, int]:
    """Returns the ids of unk, bos and eos in the model; -1 for one that is absent."""
    return processor.unk_id(), processor.bos_id(), processor.eos_id()


def has_byte_pieces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """True when unknown characters become UTF-8 bytes, as in LLaMA's models."""
    return processor.is_byte(processor.piece_to_id("<0x00>"))


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Trains a unigram model in XLM-R's layout (unk 0, bos 1, eos 2) and writes it to `path`.

    The same texts give the same bytes. As an XLM-R tokenizer it has `vocab_size` + 2 ids.

    Raises:
        UserError: there are no texts, or too few different ones for a vocabulary of this size.
    """
    lines = [" ".join(text.split()) for text in texts]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError("no text to train a SentencePiece model on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(f"cannot train a SentencePiece model of {vocab_size} pieces: {reason}") from None
    write_atomically(path, model.getvalue())


def _check_added(added: Mapping[str, int], known: Mapping[str, int], last: int) -> dict[str, int]:
    """Returns the added tokens that lie beyond the vocabulary; the others must agree with it."""
    outside = {}
    for token, id_ in added.items():
        if id_ > last and token not in known:
            outside[token] = id_
        elif known.get(token) != id_:
            raise UserError(f"added token {token!r} has the id {id_}, which the vocabulary of {last + 1} contradicts")
    if len(set(outside.values())) != len(outside):
        raise UserError("two added tokens have the same id")
    if outside and max(outside.values()) > last + len(outside):
        raise UserError(f"added tokens leave gaps between id {last} and {max(outside.values())}")
    return outside
