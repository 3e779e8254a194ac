"""Writes everything the demonstration trains and is tested on into one folder.

    digits/1.0.0/                 TFDS dataset: the scans as PNG files, their labels, captions in every language
    parallel/en-es.jsonl          {"source_text": English sentence, "text": its translation}, one file per language
    prompts/es_classnames.json, es_zeroshot_classification_templates.json     in CLIP_benchmark's form
    tokenizers/english            byte-pair encoding as CLIP has it, for the teacher
    tokenizers/multilingual       SentencePiece as XLM-R has it, for the student

The scans are the UCI handwritten digits that scikit-learn bundles: 1,797 pictures of 8 × 8 pixels by 43 writers.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.convert.writer import new_folder
from vlm.data.tfds_writer import write_tfds
from vlm.demo.phrases import DIGITS, LANGUAGES, captions, pairs
from vlm.tokenizers.spm import train_sentencepiece

TEST_PER_DIGIT = 36
CAPTIONS_PER_IMAGE = 2
ENGLISH_VOCAB = 340
MULTILINGUAL_PIECES = 380
DATASET = "digits"
START, END = "<|startoftext|>", "<|endoftext|>"


def prepare(folder: str | os.PathLike, seed: int = 0) -> Path:
    """Writes the folder, whole or not at all; a folder that is there already is left as it is. Returns it."""
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as draft:
        write_images(draft, seed)
        write_parallel_text(draft / "parallel")
        write_prompts(draft / "prompts")
        write_tokenizers(draft / "tokenizers")
    return folder


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans as uint8[N, 8, 8], dark ink on white paper, and the digits int[N]."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return 255 - np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(int)


def split(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of the "train" and the "test" split; the test split has as many of each digit, taking turns."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.flatnonzero(labels == digit)) for digit in DIGITS]
    test = np.stack([row[:TEST_PER_DIGIT] for row in rows], axis=1).reshape(-1)
    train = np.concatenate([row[TEST_PER_DIGIT:] for row in rows])
    return {"train": rng.permutation(train), "test": test}


def png(pixels: np.ndarray) -> bytes:
    """A grey picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, seed: int) -> None:
    """Writes the TFDS dataset; every picture has a few captions in every language, drawn at random."""
    scans, labels = load_scans()
    rng = np.random.default_rng((seed, 1))
    sentences = {code: [captions(code, digit) for digit in DIGITS] for code in LANGUAGES}

    def examples(rows: Iterable[int]) -> Iterator[dict[str, Any]]:
        for row in rows:
            digit = labels[row]
            choices = {code: sentences[code][digit] for code in LANGUAGES}
            drawn = {code: [str(t) for t in rng.choice(c, CAPTIONS_PER_IMAGE, False)] for code, c in choices.items()}
            yield {"image": png(scans[row]), "label": int(digit), "number": int(row), **drawn}

    features = {"image": "image", "label": LANGUAGES["en"].words, "number": "int"}
    features |= {code: ["text"] for code in LANGUAGES}
    splits = {name: examples(rows) for name, rows in split(labels, seed).items()}
    write_tfds(folder, DATASET, splits, features, num_shards=1)
    shutil.rmtree(folder / "downloads", ignore_errors=True)  # TFDS makes it, empty


def write_parallel_text(folder: Path) -> None:
    """Writes one file of sentence pairs per language, English with itself included."""
    folder.mkdir(parents=True)
    for code in LANGUAGES:
        rows = [{"source_text": pair.english, "text": pair.text} for pair in pairs(code)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"en-{code}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_prompts(folder: Path) -> None:
    """Writes class names and templates for zero-shot classification."""
    folder.mkdir(parents=True)
    for code, language in LANGUAGES.items():
        for name, values in (("classnames", language.words), ("zeroshot_classification_templates", language.phrases)):
            content = json.dumps({DATASET: list(values)}, ensure_ascii=False, indent=1)
            (folder / f"{code}_{name}.json").write_text(content + "\n", encoding="utf-8")


def write_tokenizers(folder: Path) -> None:
    """Trains and writes both tokenizers."""
    english, multilingual = folder / "english", folder / "multilingual"
    english.mkdir(parents=True)
    multilingual.mkdir()
    train_bpe([pair.text for pair in pairs("en")], english, ENGLISH_VOCAB)
    texts = [pair.text for code in LANGUAGES for pair in pairs(code)]
    train_sentencepiece(texts, multilingual / "sentencepiece.bpe.model", MULTILINGUAL_PIECES)


def train_bpe(texts: Sequence[str], folder: Path, vocab_size: int) -> None:
    """Trains a lower-case byte-level byte-pair encoding; texts stand between CLIP's start (0) and end (1) tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer: Any = trainers.BpeTrainer
    # Without end-of-word symbols, unlike CLIP: the library numbers those in the order of a hash table.
    options = {"special_tokens": [START, END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainer(vocab_size=vocab_size, show_progress=False, **options))
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}  # CLIP's
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
