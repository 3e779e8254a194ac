"""Images and texts to FLAVA's batches: squashed pictures, the codebook's pictures, BERT's tokens, masks and labels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.data.augment import augment, random_box
from vlm.data.block_masking import block_mask
from vlm.data.image import ImageInput, ImageSettings, open_image, process
from vlm.data.masking import mask_tokens, mask_words
from vlm.data.text import one_text
from vlm.errors import UserError
from vlm.manifest import write_atomically
from vlm.models.flava import targets
from vlm.models.flava.image_files import read_image_settings, write_image_settings
from vlm.models.flava.processor_config import ProcessorConfig
from vlm.strict import build
from vlm.tokenizers import Tokenizer, load
from vlm.tokenizers.files import read_json, read_json_if_present
from vlm.tokenizers.loading import FILE_NAMES
from vlm.tokenizers.tokenizer_json import LibraryTokenizer

_SETTINGS_FILE = "vlm_processor.json"
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_STORED = (
    "task",
    "num_labels",
    "max_length",
    "text_length",
    "token_types",
    "mlm_probability",
    "max_masked_tokens",
    "itm_probability",
)


class Processor:
    """Turns images and texts into batches (`processor(...)`), and raw examples into rows (`processor.example`).

    Args:
        tokenizer: BERT's; None where only images are processed.
        config: see `ProcessorConfig`; its `tokenizer` and `answers` are not opened here.
        answers: the list of answers that "soft_labels" scores.

    Attributes:
        max_length: tokens of a row.
        reads_others: whether training examples must know their source (`vlm.data.others`).
    """

    def __init__(
        self, tokenizer: Tokenizer | None, config: ProcessorConfig | None = None, answers: Sequence[str] | None = None
    ):
        self.tokenizer, self.config = tokenizer, config or ProcessorConfig()
        self.max_length = self.config.max_length
        self.answers = tuple(answers) if answers is not None else None
        self.reads_others = self.config.task == "pretrain" and self.config.itm_probability > 0
        self._numbers = {text.strip().lower(): number for number, text in enumerate(self.answers or ())}
        self._special: Collection[int] = ()
        if tokenizer is not None:
            ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id)
            self._special = {id_ for id_ in ids if id_ is not None}
        self._continues = tokenizer.continuations() if isinstance(tokenizer, LibraryTokenizer) else None

    @property
    def image_settings(self) -> ImageSettings:
        """How pictures become arrays. With another size, patches and visual words are as many as fit in it."""
        return self.config.image

    @image_settings.setter
    def image_settings(self, settings: ImageSettings) -> None:
        self.config = self.config.with_image(settings)

    @classmethod
    def from_config(cls, config: ProcessorConfig) -> Processor:
        """Opens the files that a configuration names."""
        answers = targets.read_answers(config.answers, config.num_answers) if config.answers else None
        return cls(load(config.tokenizer) if config.tokenizer else None, config, answers)

    @staticmethod
    def rows(
        config: ProcessorConfig, fields: Collection[str] = ("image", "text")
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype, without batch axis, of everything `example` may make of raw examples with these fields."""
        rows: dict[str, tuple[tuple[int, ...], str]] = {}
        pretrain, pixels = config.task == "pretrain", "float32" if config.normalise else "uint8"
        if "image" in fields and config.image.output_size is not None:
            rows["image"] = ((*config.image.output_size, 3), pixels)
            if pretrain and config.mask_patches:
                rows["patch_mask"] = ((int(np.prod(config.grid or ())),), "bool")
            if pretrain and config.codebook_size is not None:
                rows["codebook_image"] = ((config.codebook_size, config.codebook_size, 3), pixels)
        if "text" in fields:
            length = (config.max_length if "image" in fields else config.text_length,)
            rows |= {"tokens": (length, "int32"), "mask": (length, "bool")}
            rows |= {"token_types": (length, "int32")} if "text_pair" in fields and config.token_types else {}
            if pretrain and config.mlm_probability:
                rows |= {"masked_tokens": (length, "int32"), "token_labels": (length, "int32")}
            if pretrain and config.itm_probability and "image" in fields:
                rows["itm_labels"] = ((), "int32")
        if config.task in ("classification", "regression"):
            rows["labels"] = ((), "int32" if config.task == "classification" else "float32")
        if config.task == "soft_labels":
            rows["label_scores"] = ((config.num_answers,), "float32")
        return rows

    def __call__(
        self,
        images: Sequence[ImageInput] | None = None,
        texts: Sequence[str] | None = None,
        pairs: Sequence[str] | None = None,
        *,
        padding: Literal["longest", "max_length"] = "max_length",
        rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes a batch for evaluation or inference, or with `rng` one for pretraining.

        Args:
            images: paths, encoded bytes, PIL images or uint8 arrays.
            texts, pairs: strings, and second sentences to go with them, cut to `max_length` tokens.
            padding: rows of `max_length`, so that a compiled model sees one shape, or as long as the longest.
            rng: draws what is hidden.

        Returns:
            `image` float32[B, H, W, 3], `tokens` int32[B, L], `mask` bool[B, L], for pairs `token_types` int32[B, L];
            with `rng` also `codebook_image` float32[B, S, S, 3], `patch_mask` bool[B, P], `masked_tokens` and
            `token_labels` int32[B, L], as `example` makes them. Without images or texts their keys are absent.

        Raises:
            UserError: naming the file, or the number of the image or text, that is wrong.
        """
        batch: dict[str, np.ndarray] = {}
        if images is not None:
            if isinstance(images, (str, bytes, Path, Image.Image)):
                raise UserError(f"images must be a list, found one {type(images).__name__}")
            rows = [self._pictures(image, f"image {index}", hide=rng) for index, image in enumerate(images)]
            size = self.image_settings.output_size or (0, 0)
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
            batch = batch or {"image": np.zeros((0, *size, 3), np.float32)}
        if texts is not None:
            batch |= self._tokens(texts, pairs, self.max_length, padding)
            if rng is not None and self.config.mlm_probability:
                words = zip(batch["tokens"], batch["mask"], strict=True)
                hidden = [self._hidden(*row, rng, whole_words=images is not None) for row in words]
                batch |= {name: np.stack([row[name] for row in hidden]) for name in (hidden[0] if hidden else ())}
        return batch

    def example(self, example: Mapping[str, Any], rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Makes the arrays of one raw example, without batch axis; the loader's transform.

        Args:
            example: `image` (encoded bytes), `text` (a string, or several of which training draws one and evaluation
                takes the first), `text_pair` (a second sentence); what is absent or None is left out. `others`: its
                source (see `vlm.data.others`). By task: `label` (a class number or True and False; for "regression"
                any number), `answer` (people's answers to a question, or one string).
            rng: decides on crops, captions and masks.
            train: whether to draw and hide at all.

        Returns:
            `image` [H, W, 3], `tokens`, `mask` (and of a pair of sentences `token_types`) of one length, and
            pretrain: `patch_mask` bool[P] and `codebook_image` [S, S, 3] in [0.1, 0.9] (uint8 without normalisation);
            `masked_tokens`, `token_labels` int32[L] (−100: not predicted); of image and text `itm_labels` int32[], 0
            where the caption is another's;
            classification, regression: `labels` int32[] or float32[];
            soft_labels: `label_scores` float32[K].

        Raises:
            UserError: the example lacks everything known, or holds something unusable.
        """
        name = f"example {example['key']}" if "key" in example else "example"
        pretrain, row = train and self.config.task == "pretrain", {}
        image, text = example.get("image"), example.get("text")
        if isinstance(image, (str, Path)):  # a record must not choose which file is opened
            raise UserError(f"{name}: image must be encoded bytes, found a path")
        if image is not None:
            row |= self._pictures(image, f"{name}: image", rng if train else None, rng if pretrain else None)
        if text is not None:
            text = one_text(text, rng if train else None, f"{name}: text")
            if pretrain and image is not None and self.config.itm_probability:
                wrong = rng.random() < self.config.itm_probability
                row["itm_labels"] = np.asarray(not wrong, np.int32)
                text = targets.other_caption(example, rng, name) if wrong else text
            row |= self._sentence(text, example.get("text_pair"), image is None and train, f"{name}: text_pair")
            if pretrain and self.config.mlm_probability:
                row |= self._hidden(row["tokens"], row["mask"], rng, whole_words=image is not None)
        if not row:
            raise UserError(f"{name}: expected image or text, found {', '.join(example) or 'nothing'}")
        return row | self._targets(example, name, train)

    def check_patch_labels(self, count: int) -> None:
        """Whether `count` visual words of every whole picture can take the place of the codebook's picture.

        Raises:
            UserError: pictures are cropped at random, so that they have other words; the codebook's picture is made
                too; or another number of patches.
        """
        for name in ("augment", "codebook_size"):
            if (found := getattr(self.config, name)) is not None:
                raise UserError(
                    f"config.processor.{name}: expected None with config.data.codebook_cache, found {found}"
                )
        if count != int(np.prod(self.config.grid or ())):
            raise UserError(f"config.data.codebook_cache: {count} visual words, but {self.config.grid} patches")

    def codebook_image(self, image: ImageInput) -> np.ndarray:
        """The codebook's picture [S, S, 3] of a whole image, values in [0.1, 0.9].

        Raises:
            UserError: not a picture.
        """
        return _codebook_image(open_image(image, "image"), self.config.codebook_size or 112, True)

    def _sentence(self, text: str, pair: Any, alone: bool, name: str) -> dict[str, np.ndarray]:
        length = self.config.text_length if alone else self.max_length
        second = None if pair is None else [one_text(pair, None, name)]
        return {key: value[0] for key, value in self._tokens([text], second, length, "max_length").items()}

    def _tokens(self, texts: Sequence[str], pairs: Any, length: int, padding: Any) -> dict[str, np.ndarray]:
        batch = self._tokenizer()(texts, max_length=length, padding=padding, pairs=pairs)
        return {key: value for key, value in batch.items() if key != "token_types" or self.config.token_types}

    def _targets(self, example: Mapping[str, Any], name: str, train: bool) -> dict[str, np.ndarray]:
        task, label, answer = self.config.task, example.get("label"), example.get("answer")
        if task == "classification" and (train or label is not None):
            return {"labels": targets.class_label(label, f"{name}: label", self.config.num_labels)}
        if task == "regression" and (train or label is not None):
            return {"labels": targets.value_label(label, f"{name}: label")}
        if task == "soft_labels" and (train or answer is not None):
            if not self._numbers:
                raise UserError("this processor has no list of answers (config.processor.answers)")
            return {"label_scores": targets.answer_scores(answer, self._numbers, f"{name}: answer")}
        return {}

    def _pictures(
        self,
        value: Any,
        name: str,
        vary: np.random.Generator | None = None,
        hide: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """The picture for the encoder, and with `hide` the codebook's and the hidden patches."""
        config, picture = self.config, open_image(value, name)
        normalise = config.normalise or vary is None
        if vary is not None and config.augment is not None:
            if config.task != "pretrain":
                return {"image": augment(picture, self.image_settings, config.augment, vary, normalise=normalise)}
            # Cropped first: with `box` the filter would look at pixels outside the crop.
            picture = picture.crop(random_box(picture.width, picture.height, config.augment, vary))
        row = {"image": process(picture, self.image_settings, normalise=normalise)}
        if hide is not None and config.codebook_size is not None:
            row["codebook_image"] = _codebook_image(picture, config.codebook_size, normalise)
        if hide is not None and config.mask_patches and config.grid is not None:
            row["patch_mask"] = block_mask(config.grid, config.mask_patches, hide, config.blocks).reshape(-1)
        return row

    def _hidden(
        self, tokens: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, whole_words: bool
    ) -> dict[str, np.ndarray]:
        """Hides tokens of one row: whole words of captions, single pieces of texts alone."""
        tokenizer = self._tokenizer()
        if tokenizer.mask_id is None or self._continues is None:
            raise UserError("masked language modelling needs a tokenizer of WordPieces with a mask token")
        options: dict[str, Any] = {"mask_id": tokenizer.mask_id, "special_ids": self._special}
        options |= {"probability": self.config.mlm_probability, "vocab_size": tokenizer.vocab_size}
        if whole_words:
            fed, labels = mask_words(tokens, mask, rng, continues=self._continues, **options)
        else:
            fed, labels = mask_tokens(tokens, mask, rng, most=self.config.max_masked_tokens, **options)
        return {"masked_tokens": fed, "token_labels": labels}

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and settings; Hugging Face's FlavaProcessor reads the folder too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(directory)
        settings: dict[str, Any] = {"format_version": 1, **{name: getattr(self.config, name) for name in _STORED}}
        settings |= {"max_length": self.max_length, "answers": self.answers}
        for file, content in ((_SETTINGS_FILE, settings), (_IMAGE_FILES[0], write_image_settings(self.config))):
            write_atomically(directory / file, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, directory: str | Path, model: Any = None, tokenizer: str | Path | None = None) -> Processor:
        """Reads a folder written by `save`, a Hugging Face folder, or one with a tokenizer alone.

        Of the last, `model`, the architecture, tells the size of pictures. Augmentation is not stored.

        Args:
            directory: folder of the weights. model: the architecture. tokenizer: folder to read the tokenizer from
                instead, and nothing else.

        Raises:
            UserError: the folder holds neither a tokenizer nor image settings, or a file is wrong.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such folder (expected a processor)")
        words = directory if tokenizer is None else Path(tokenizer)
        has_tokenizer = any((words / name).is_file() for name in FILE_NAMES)
        image_file = next((directory / name for name in _IMAGE_FILES if (directory / name).is_file()), None)
        if not has_tokenizer and image_file is None:
            raise UserError(f"{directory}: no processor found; expected {_IMAGE_FILES[0]} and tokenizer files")
        path = directory / _SETTINGS_FILE
        settings = read_json_if_present(path)
        if settings.pop("format_version", 1) != 1:
            raise UserError(f"{path}: another format version, expected 1")
        answers = settings.pop("answers", None)
        if image_file is not None:
            settings |= read_image_settings(read_json(image_file), str(image_file))
        try:
            config = build(ProcessorConfig, settings, "processor")
        except UserError as error:
            raise UserError(f"{directory}: {error}") from None
        if not settings and getattr(model, "vision", None) is not None:
            config = config.with_image(dataclasses.replace(config.image, size=model.vision.image_size))
        return cls(load(words) if has_tokenizer else None, config, answers)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this processor has no tokenizer, so it cannot take texts")
        return self.tokenizer


def _codebook_image(picture: Image.Image, size: int, normalise: bool) -> np.ndarray:
    """DALL-E's preprocessing: 0.8 · pixel / 255 + 0.1, of the picture squashed by Lanczos' filter."""
    pixels = process(picture, ImageSettings(size, None, None, None, "lanczos", "exact"), normalise=normalise)
    return np.float32(0.8) * pixels + np.float32(0.1) if normalise else pixels
