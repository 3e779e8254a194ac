"""CLIP's lower-cased byte-level BPE, built on the `tokenizers` library.

Text is normalised as the Hugging Face class does it (NFC, white space, lower case). The original also repairs
mojibake and decodes HTML entities beforehand; texts that need neither get the same ids.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from vlm.errors import UserError
from vlm.tokenizers.files import MAX_MODEL_BYTES
from vlm.tokenizers.tokenizer_json import LibraryTokenizer, add_tokens, call_library

START, END = "<|startoftext|>", "<|endoftext|>"
_VOCAB_SIZE = 49408
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def clip_tokenizer(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    pad_id: int | None = None,
) -> LibraryTokenizer:
    """Builds CLIP's tokenizer: rows are `<|startoftext|> text <|endoftext|>`.

    Padding is `<|endoftext|>` as in the Hugging Face files; OpenAI's code pads with id 0: pass `pad_id=0`. The
    model ignores what follows the first end token, so both give the same features.
    """
    for token in (START, END):
        if token not in vocab:
            raise UserError(f"{path}: not a CLIP vocabulary, it lacks {token}")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", **tokens, **(config or {})}

    def build() -> tokenizers.Tokenizer:
        model = models.BPE(
            dict(vocab), list(merges), continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
        )
        return tokenizers.Tokenizer(model)

    backend = call_library(path, build)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ends = (END, vocab[END]), (START, vocab[START])
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    add_tokens(backend, {token: vocab[token] for token in (START, END)}, path)
    return LibraryTokenizer(backend, config, pad_id=pad_id)


def read_merges(lines: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """Returns the pairs of a merges file without its version line."""
    if lines and (lines[0].startswith("#version") or "bpe_simple_vocab" in lines[0]):
        lines = lines[1:]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{path}: not a merges file, a line does not hold two tokens")
    return [(first, second) for first, second in merges]


def original_files(data: bytes, path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary and merges of OpenAI's bpe_simple_vocab_16e6.txt.gz.

    The file holds more merges than CLIP uses. The vocabulary is implied: 256 bytes, the same at a word's end,
    the merges in order, two special tokens.
    """
    lines = _gunzip(data, path).decode(errors="replace").split("\n")
    symbols = _byte_symbols()
    merges = read_merges(lines[: _VOCAB_SIZE - 2 - 2 * len(symbols) + 1], path)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += ["".join(pair) for pair in merges]
    vocab = {token: id_ for id_, token in enumerate([*tokens, START, END])}
    if len(vocab) != _VOCAB_SIZE:
        raise UserError(f"{path}: expected the {_VOCAB_SIZE} tokens of CLIP, found {len(vocab)}")
    return vocab, merges


def _gunzip(data: bytes, path: Path) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    try:
        text = stream.decompress(data, MAX_MODEL_BYTES)
    except zlib.error as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from None
    if stream.unconsumed_tail:
        raise UserError(f"{path}: more than {MAX_MODEL_BYTES} bytes when unpacked")
    if not stream.eof:
        raise UserError(f"{path}: truncated gzip file")
    return text


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes: printable Latin-1 as it is, then the rest from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
