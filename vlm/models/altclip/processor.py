"""Images and texts to AltCLIP's batches: CLIP's picture pipeline, XLM-R's tokens, and CLIP's tokens for the teacher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.data.augment import AugmentSettings, augment
from vlm.data.image import ImageInput, ImageSettings, open_image, process
from vlm.data.image_config import read_image_config, write_image_config
from vlm.data.masking import mask_tokens
from vlm.data.text import one_text
from vlm.errors import UserError
from vlm.manifest import write_atomically
from vlm.strict import at_least, unused
from vlm.tokenizers import Tokenizer, load
from vlm.tokenizers.files import read_json, read_json_if_present
from vlm.tokenizers.loading import FILE_NAMES

TEACHER_MAX_LENGTH = 77
"""Positions of the published CLIP text towers, special tokens included."""
MAX_LENGTH = 77
"""Where the authors cut texts in training and evaluation."""
_SETTINGS_FILE = "vlm_processor.json"
_TEACHER_FOLDER = "teacher_tokenizer"
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """The processor's section of a configuration.

    Attributes:
        tokenizer, teacher_tokenizer: folders or files that `vlm.tokenizers.load` reads; None: not needed.
        image: how pictures become arrays.
        augment: random crops and colours in training; None: pictures as in evaluation.
        max_length, teacher_max_length: length of token rows, and of the teacher's (at most its position table's).
        normalise: False makes training examples with uint8 pictures, a quarter of the bytes, that the training step
            normalises on the device.
        mlm_probability: share of tokens hidden in training for masked language modelling (`labels` are then made).
    """

    tokenizer: str | None = None
    teacher_tokenizer: str | None = None
    image: ImageSettings = dataclasses.field(default_factory=ImageSettings)
    augment: AugmentSettings | None = None
    max_length: int = MAX_LENGTH
    teacher_max_length: int = TEACHER_MAX_LENGTH
    normalise: bool = True
    mlm_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mlm_probability < 1:
            raise ValueError(f"mlm_probability: expected a share in [0, 1), found {self.mlm_probability}")
        at_least(2, self, "max_length", "teacher_max_length")

    def check(self, model: Any, loss: Any) -> None:
        """Whether the examples fit the architecture and the objective of a run.

        Args:
            model: the family's architecture; loss: its loss settings.

        Raises:
            UserError: pictures of another size than the image tower's, rows longer than a position table, tokens
                hidden for an objective that does not predict them, or a teacher's for one that has no teacher.
        """
        if loss.objective != "teacher_learning":
            try:
                unused(self, f"objective {loss.objective!r}", "teacher_tokenizer", "teacher_max_length")
            except ValueError as error:
                raise UserError(f"config.processor.{error}") from None
        side, size = model.vision and model.vision.image_size, self.image.output_size
        side = side if loss.objective == "contrastive" else None  # the others read no pictures
        if side is not None and size != (side, side):
            expected = f"expected the {side} x {side} of config.model.vision.image_size"
            found = "pictures of any size" if size is None else "{} x {}".format(*size)
            raise UserError(f"config.processor.image: {expected}, found {found}")
        limits = {
            "max_length": model.text.max_tokens if model.text else model.clip_text and model.clip_text.max_length,
            "teacher_max_length": self.teacher_tokenizer and loss.teacher and loss.teacher.max_length,
        }
        for name, limit in limits.items():
            if limit and getattr(self, name) > limit:
                expected = f"expected at most the {limit} positions of the text tower"
                raise UserError(f"config.processor.{name}: {expected}, found {getattr(self, name)}")
        if self.mlm_probability and loss.objective != "lm":
            expected = f"expected 0 with objective {loss.objective!r}, which predicts no hidden tokens"
            raise UserError(f"config.processor.mlm_probability: {expected}, found {self.mlm_probability}")


class Processor:
    """Turns images and texts into batches (`processor(...)`), and raw examples into rows (`processor.example`).

    Args:
        tokenizer: of the text tower; None where only images are processed.
        image_settings: None where only texts are processed.
        max_length: rows of tokens are cut, and by default padded, to this length.
        teacher_tokenizer: CLIP's, for teacher learning.
        augment: random variation of pictures in training.
        normalise: False gives uint8 pictures in training (`example`); all others are normalised here.
        mlm_probability: share of tokens hidden in training; 0: none.
        teacher_max_length: length of the teacher's token rows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        image_settings: ImageSettings | None,
        max_length: int = MAX_LENGTH,
        teacher_tokenizer: Tokenizer | None = None,
        *,
        augment: AugmentSettings | None = None,
        normalise: bool = True,
        mlm_probability: float = 0.0,
        teacher_max_length: int = TEACHER_MAX_LENGTH,
    ):
        for name, length in (("max_length", max_length), ("teacher_max_length", teacher_max_length)):
            if isinstance(length, bool) or not isinstance(length, int) or length < 2:
                raise UserError(f"{name} must be a whole number of at least 2, found {length!r}")
        self.tokenizer, self.teacher_tokenizer = tokenizer, teacher_tokenizer
        self.image_settings, self.augment = image_settings, augment
        self.max_length, self.teacher_max_length, self.normalise = max_length, teacher_max_length, normalise
        self.mlm_probability = mlm_probability

    @classmethod
    def from_config(cls, config: ProcessorConfig) -> Processor:
        """Opens the tokenizers that a configuration names."""
        tokenizer, teacher = (load(path) if path else None for path in (config.tokenizer, config.teacher_tokenizer))
        options: dict[str, Any] = {"augment": config.augment, "normalise": config.normalise}
        options |= {"mlm_probability": config.mlm_probability, "teacher_max_length": config.teacher_max_length}
        return cls(tokenizer, config.image, config.max_length, teacher, **options)

    @staticmethod
    def rows(config: ProcessorConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype, without batch axis, of everything `example` may make; opens no file."""
        text = {"tokens": ((config.max_length,), "int32"), "mask": ((config.max_length,), "bool")}
        length = config.teacher_max_length
        teacher = {"teacher_tokens": ((length,), "int32"), "teacher_mask": ((length,), "bool")}
        size = config.image.output_size
        image = {"image": ((*size, 3), "float32" if config.normalise else "uint8")} if size else {}
        return image | text | (teacher if config.teacher_tokenizer else {})

    def __call__(
        self,
        images: Sequence[ImageInput] | None = None,
        texts: Sequence[str] | None = None,
        *,
        padding: Literal["longest", "max_length"] = "max_length",
    ) -> dict[str, np.ndarray]:
        """Makes a batch for evaluation or inference.

        Args:
            images: paths, encoded bytes, PIL images, or uint8 arrays [H, W], [H, W, 3] or [H, W, 4].
            texts: strings, cut to `max_length` tokens.
            padding: rows of `max_length`, so that a compiled model sees one shape, or as long as the longest.

        Returns:
            `image` float32[B, H, W, 3] (uint8 without normalisation), `tokens` int32[B, L], `mask` bool[B, L];
            without images or texts their keys are absent.

        Raises:
            UserError: naming the file, or the number of the image or text, that is wrong.
        """
        batch: dict[str, np.ndarray] = {}
        if images is not None:
            if isinstance(images, (str, bytes, Path, Image.Image)):
                raise UserError(f"images must be a list, found one {type(images).__name__}")
            rows = [self._image(image, f"image {index}") for index, image in enumerate(images)]
            batch["image"] = self._stack(rows)
        if texts is not None:
            batch |= self._tokenizer()(texts, max_length=self.max_length, padding=padding)
        return batch

    def example(self, example: Mapping[str, Any], rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Makes the arrays of one raw example, without batch axis; the loader's transform.

        Args:
            example: `image` (encoded bytes), `text` (a string, or several of which training draws one and
                evaluation takes the first), `source_text` (the English side of a parallel pair), `target` (its
                precomputed embedding), `label` (an integer, kept in evaluation). Absent or None: left out.
            rng: decides on crops, colours and captions.
            train: whether to draw and vary at all.

        Returns:
            `image` [H, W, 3], `tokens`, `mask` [max_length]; with a teacher tokenizer and no target
            `teacher_tokens`, `teacher_mask` [teacher_max_length]; `target` float32[D]; `labels` int32[], in masked
            language modelling int32[max_length] with −100 where nothing is hidden.

        Raises:
            UserError: the example lacks everything known, or holds something unusable.
        """
        row: dict[str, np.ndarray] = {}
        name = f"example {example['key']}" if "key" in example else "example"
        if isinstance(example.get("image"), (str, Path)):  # a record must not choose which file is opened
            raise UserError(f"{name}: image must be encoded bytes, found a path")
        if example.get("image") is not None:
            row["image"] = self._image(example["image"], f"{name}: image", rng if train else None)
        if example.get("text") is not None:
            text = one_text(example["text"], rng if train else None, f"{name}: text")
            row |= _encode(self._tokenizer(), text, self.max_length)
            if train and self.mlm_probability:
                row["tokens"], row["labels"] = self._masked(row, rng)
        if example.get("target") is not None:
            row["target"] = _vector(example["target"], f"{name}: target")
        elif example.get("source_text") is not None and self.teacher_tokenizer is not None:
            text = one_text(example["source_text"], rng if train else None, f"{name}: source_text")
            teacher = _encode(self.teacher_tokenizer, text, self.teacher_max_length)
            row |= {f"teacher_{key}": value for key, value in teacher.items()}
        if not row:
            raise UserError(f"{name}: expected image, text or source_text, found {', '.join(example) or 'nothing'}")
        if not train and example.get("label") is not None:
            row["labels"] = np.asarray(example["label"], np.int32)
        return row

    def _masked(self, row: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        tokenizer = self._tokenizer()
        if tokenizer.mask_id is None:
            raise UserError("masked language modelling: the tokenizer has no mask token")
        special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id} - {None}
        options: dict[str, Any] = {"mask_id": tokenizer.mask_id, "special_ids": special}
        options |= {"probability": self.mlm_probability, "vocab_size": tokenizer.vocab_size}
        return mask_tokens(row["tokens"], row["mask"], rng, **options)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizers and settings; Hugging Face's AltCLIPProcessor reads the folder too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(directory)
        if self.teacher_tokenizer is not None:
            self.teacher_tokenizer.save(directory / _TEACHER_FOLDER)
        settings = {"format_version": 1, "max_length": self.max_length}
        if self.teacher_tokenizer is not None:
            settings["teacher_max_length"] = self.teacher_max_length
        files: dict[str, Mapping[str, Any]] = {_SETTINGS_FILE: settings}
        if self.image_settings is not None:
            files[_IMAGE_FILES[0]] = write_image_config(self.image_settings)
        for file, content in files.items():
            write_atomically(directory / file, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, directory: str | Path, model: Any = None, tokenizer: str | Path | None = None) -> Processor:
        """Reads a folder written by `save`, a Hugging Face folder, or one with a tokenizer alone.

        Of the last, `model`, the architecture, tells the size of pictures, which are processed as CLIP's. A part that
        the folder lacks (a vision tower alone has no tokenizer) is left out, and asking for it is an error then.
        Augmentation belongs to a training run and is not stored.

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
        settings = read_json_if_present(directory / _SETTINGS_FILE)
        if settings.get("format_version", 1) != 1:
            raise UserError(f"{directory / _SETTINGS_FILE}: format version {settings['format_version']}, expected 1")
        teacher, images = directory / _TEACHER_FOLDER, None
        if image_file is not None:
            images = read_image_config(read_json(image_file), str(image_file))
        elif not settings and getattr(model, "vision", None) is not None:
            images = ImageSettings(model.vision.image_size, model.vision.image_size)
        return cls(
            load(words) if has_tokenizer else None,
            images,
            settings.get("max_length", MAX_LENGTH),
            load(teacher) if teacher.is_dir() else None,
            teacher_max_length=settings.get("teacher_max_length", TEACHER_MAX_LENGTH),
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this processor has no tokenizer, so it cannot take texts")
        return self.tokenizer

    def _image(self, image: Any, name: str, rng: np.random.Generator | None = None) -> np.ndarray:
        if self.image_settings is None:
            raise UserError("this processor has no image settings, so it cannot take images")
        picture = open_image(image, name)
        normalise = self.normalise or rng is None
        if rng is not None and self.augment is not None:
            return augment(picture, self.image_settings, self.augment, rng, normalise=normalise)
        return process(picture, self.image_settings, normalise=normalise)

    def _stack(self, rows: list[np.ndarray]) -> np.ndarray:
        if not rows:
            size = (self.image_settings and self.image_settings.output_size) or (0, 0)
            return np.zeros((0, *size, 3), np.float32)
        if len({row.shape for row in rows}) > 1:
            raise UserError("images differ in size after resizing: set a crop, or resize to an exact size")
        return np.stack(rows)


def _encode(tokenizer: Tokenizer, text: str, length: int) -> dict[str, np.ndarray]:
    return {key: value[0] for key, value in tokenizer([text], max_length=length, padding="max_length").items()}


def _vector(value: Any, name: str) -> np.ndarray:
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        vector = np.zeros((0, 0), np.float32)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise UserError(f"{name}: expected a vector of finite numbers, found {value!r:.80}")
    return vector
