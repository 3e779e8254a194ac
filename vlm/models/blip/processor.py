"""Images and texts to BLIP's batches: squashed pictures, cleaned texts, BERT's tokens, and what each task adds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.data.augment import augment
from vlm.data.image import ImageInput, ImageSettings, open_image, process
from vlm.data.image_config import read_image_config, write_image_config
from vlm.data.masking import IGNORE
from vlm.data.text import clean_caption, clean_question, one_text, swap_sides
from vlm.errors import UserError
from vlm.manifest import write_atomically
from vlm.models.blip import dialog, targets
from vlm.models.blip.processor_config import ProcessorConfig, Task
from vlm.strict import build
from vlm.tokenizers import Tokenizer, load
from vlm.tokenizers.files import read_json, read_json_if_present
from vlm.tokenizers.loading import FILE_NAMES
from vlm.tokenizers.tokenizer_json import LibraryTokenizer

DEC, ENC = "[DEC]", "[ENC]"
"""Start of the decoder and of the image-grounded encoder; 30522 and 30523 after the English uncased vocabulary."""
_SETTINGS_FILE = "vlm_processor.json"
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_STORED = ("task", "max_words", "clean", "prompt", "max_answers", "answer_length", "single_answer_weight")
_STORED += ("caption_length",)
_TASKS_OF_CLASSES: dict[str, Task] = {
    "BlipForConditionalGeneration": "caption",
    "BlipForQuestionAnswering": "vqa",
    "BlipForImageTextRetrieval": "retrieval",
}


class Processor:
    """Turns images and texts into batches (`processor(...)`), and raw examples into rows (`processor.example`).

    Rows of tokens are `[CLS] text [SEP]`; the model writes [ENC] or [DEC] over column 0 as it needs.

    Args:
        tokenizer: BERT's; [DEC] and [ENC] are appended if it lacks them. None where only images are processed.
        config: see `ProcessorConfig`; its `tokenizer` is not opened here.

    Attributes:
        dec_id, enc_id: ids of [DEC] and [ENC], or None without tokenizer.
        max_length: tokens of a row.
    """

    def __init__(self, tokenizer: Tokenizer | None, config: ProcessorConfig | None = None):
        self.config = config or ProcessorConfig()
        self.tokenizer = tokenizer if tokenizer is None else _with_modes(tokenizer)
        self.dec_id, self.enc_id = (self.tokenizer and self.tokenizer.token_id(token) for token in (DEC, ENC))
        self.image_settings = self.config.image
        self.max_length = self.config.length

    @classmethod
    def from_config(cls, config: ProcessorConfig) -> Processor:
        """Opens the tokenizer that a configuration names."""
        return cls(load(config.tokenizer) if config.tokenizer else None, config)

    @staticmethod
    def rows(config: ProcessorConfig) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype, without batch axis, of everything `example` may make; opens no file."""
        length, answers = (config.length,), (config.max_answers, config.answer_length)
        rows: dict[str, tuple[tuple[int, ...], str]] = {"tokens": (length, "int32"), "mask": (length, "bool")}
        if config.image.output_size is not None:
            pair = (2,) if config.task == "nlvr" else ()
            rows["image"] = ((*pair, *config.image.output_size, 3), "float32" if config.normalise else "uint8")
        if config.task == "retrieval":
            rows["image_id"] = ((), "int32")
        if config.task == "vqa":
            rows |= {"answer_tokens": (answers, "int32"), "answer_mask": (answers, "bool")}
            rows["answer_weights"] = (answers[:1], "float32")
        if config.task == "dialog":
            caption = (config.caption_length,)
            rows |= {"caption_tokens": (caption, "int32"), "caption_mask": (caption, "bool")}
        if config.task in ("caption", "nlvr", "classification", "dialog"):
            rows["labels"] = (length if config.task == "caption" else (), "int32")
        return rows

    def __call__(
        self,
        images: Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None = None,
        texts: Sequence[str] | None = None,
        *,
        padding: Literal["longest", "max_length"] | None = None,
        prompts: bool | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes a batch for evaluation or inference.

        Args:
            images: paths, encoded bytes, PIL images or uint8 arrays; or lists of them, all of one length (NLVR2's
                pairs, the frames of videos).
            texts: strings, cleaned like the task's texts and cut to `max_length` tokens (prompts are neither).
            padding: on the right, to `max_length`, so that a compiled model sees one shape, or to the longest row.
                Default: prompts to the longest, others to `max_length`.
            prompts: texts are the beginnings of texts to generate: they are not cleaned, and rows end without [SEP],
                so that `mask.sum(-1)` is the exact length of each, [CLS] included. Default: for the task "caption".

        Returns:
            `image` float32[B, H, W, 3] or [B, N, H, W, 3], `tokens` int32[B, L], `mask` bool[B, L]; without images or
            texts their keys are absent.

        Raises:
            UserError: naming the file, or the number of the image or text, that is wrong.
        """
        batch: dict[str, np.ndarray] = {}
        if images is not None:
            if isinstance(images, (str, bytes, Path, Image.Image)):
                raise UserError(f"images must be a list, found one {type(images).__name__}")
            rows = [self._images(image, f"image {index}") for index, image in enumerate(images)]
            if len({row.shape for row in rows}) > 1:
                raise UserError(f"images differ in number or size: {', '.join(sorted({str(r.shape) for r in rows}))}")
            empty = (0, *(self.image_settings.output_size or (0, 0)), 3)
            batch["image"] = np.stack(rows) if rows else np.zeros(empty, np.float32)
        if texts is not None:
            prompts = self.config.task == "caption" if prompts is None else prompts
            if isinstance(texts, str):
                raise UserError("texts must be a list of strings, not one string")
            if not prompts:
                texts = [self._cleaned(text) if isinstance(text, str) else text for text in texts]
            padding = padding or ("longest" if prompts else "max_length")
            batch |= self._tokenizer()(texts, max_length=self.max_length, padding=padding, truncation=not prompts)
            if prompts:
                batch |= self._open_ended(batch["tokens"], batch["mask"], padding)
        return batch

    def example(self, example: Mapping[str, Any], rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Makes the arrays of one raw example, without batch axis; the loader's transform.

        Args:
            example: `image` (encoded bytes, or a list of them); `text` (a string, or several of which training draws
                one and evaluation takes the first), for "vqa" `question`; and by task `image_number` or `image_id`
                (numbers; see `JsonSource(number=...)`), `answer` (a list of people's answers, or one string), `label`
                (a number; True and False, also as words, are 1 and 0); for "dialog" see `vlm.data.visdial`.
            rng: decides on crops, colours, captions, and the order of pairs.
            train: whether to draw and vary at all.

        Returns:
            `image` [H, W, 3] or [N, H, W, 3], `tokens` and `mask` [max_length], and
            retrieval: `image_id` int32[], in training;
            caption: `labels` int32[max_length], the tokens, but −100 at the prompt and at padding;
            vqa: `answer_tokens` int32[A, M], `answer_mask` bool[A, M], `answer_weights` float32[A]: shares of the
            people who gave each answer. Rows beyond the answers hold [CLS] alone and weigh 0;
            nlvr: `labels` int32[]; in training half of the pairs change places, and "left" and "right" with them;
            classification: `labels` int32[];
            dialog: `tokens` of the rounds so far, the question and one answer, the right one (`labels` int32[] 1) or in
            half of the training examples a wrong one (0); `caption_tokens` int32[C], `caption_mask` bool[C].

        Raises:
            UserError: the example lacks what the task needs, or holds something unusable.
        """
        task, name = self.config.task, f"example {example['key']}" if "key" in example else "example"
        draw, row = rng if train else None, {}
        if task == "dialog":
            option, right = dialog.draw(example, draw, name)
            row = {key: x[0] if key in ("tokens", "mask") else x for key, x in self.dialog(example, (option,)).items()}
            row |= {"image": self._images(example.get("image"), f"{name}: image", draw, stored=True)}
            return row | {"labels": np.asarray(right, np.int32)}
        image, text = example.get("image"), self._text(example, draw, name)
        if task == "nlvr":
            if not isinstance(image, (list, tuple)) or len(image) != 2:
                raise UserError(f"{name}: image must be a pair of images")
            if draw is not None and draw.random() < 0.5:
                image, text = image[::-1], text and swap_sides(text)
        if image is not None:
            row["image"] = self._images(image, f"{name}: image", draw, stored=True)
        if text is not None:
            text = self.config.prompt + text if task == "caption" else text
            row |= self._encode(text, self.max_length)
        if not row:
            raise UserError(f"{name}: expected image, text or question, found {', '.join(example) or 'nothing'}")
        return row | self._targets(example, row, name, train)

    def dialog(self, example: Mapping[str, Any], options: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The texts of one round of a visual dialog, for every candidate answer, or for those at some places.

        Args:
            example: see `vlm.data.visdial`.

        Returns:
            `tokens` int32[A, max_length], `mask` bool[A, max_length]; `caption_tokens` int32[C], `caption_mask`
            bool[C].

        Raises:
            UserError: the example has no caption, question or candidates.
        """
        name = f"example {example.get('key')!r}"
        found = dialog.rows(example, options, self._tokenizer(), self._cleaned, self.max_length, name)
        caption = self._encode(self._cleaned(one_text(example.get("caption"), None, name)), self.config.caption_length)
        return found | {f"caption_{key}": value for key, value in caption.items()}

    def _text(self, example: Mapping[str, Any], rng: np.random.Generator | None, name: str) -> str | None:
        field = "question" if self.config.task == "vqa" and example.get("question") is not None else "text"
        if example.get(field) is None:
            return None
        return self._cleaned(one_text(example[field], rng, f"{name}: {field}"))

    def _targets(
        self, example: Mapping[str, Any], row: Mapping[str, np.ndarray], name: str, train: bool
    ) -> dict[str, np.ndarray]:
        """What the task adds to images and tokens."""
        task = self.config.task
        if task == "caption" and "tokens" in row:
            labels = np.where(row["mask"], row["tokens"], IGNORE).astype(np.int32)
            labels[: len(self._tokenizer().encode(self.config.prompt)) + 1] = IGNORE
            return {"labels": labels}
        if task == "retrieval" and train:
            return {"image_id": targets.image_id(example, name)}
        if task == "vqa" and example.get("answer") is not None:
            size, length = self.config.max_answers, self.config.answer_length
            options: dict[str, Any] = {
                "size": size,
                "length": length,
                "single_weight": self.config.single_answer_weight,
            }
            return targets.answers(example["answer"], self._tokenizer(), f"{name}: answer", **options)
        if task in ("nlvr", "classification") and (train or example.get("label") is not None):
            return {"labels": targets.label(example.get("label"), f"{name}: label", self.config.num_labels)}
        return {}

    def _cleaned(self, text: str) -> str:
        if not self.config.clean:
            return text
        words = self.config.words
        return clean_question(text, words) if self.config.task == "vqa" else clean_caption(text, words)

    def _open_ended(self, tokens: np.ndarray, mask: np.ndarray, padding: str) -> dict[str, np.ndarray]:
        """Removes the [SEP] that ends every row, and the column that this frees."""
        mask = mask & (np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True) - 1)
        tokens = np.where(mask, tokens, self._tokenizer().pad_id or 0).astype(np.int32)
        longest = mask.shape[1] - (padding == "longest" and mask.shape[1] > 1)
        return {"tokens": tokens[:, :longest], "mask": mask[:, :longest]}

    def for_task(self, task: Task) -> Processor:
        """The same tokenizer, pictures and prompt, with the lengths of another task."""
        return Processor(self.tokenizer, dataclasses.replace(self.config, task=task, max_length=None, max_words=None))

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and settings; Hugging Face's BlipProcessor reads the folder too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save(directory)
        settings = {"format_version": 1, "max_length": self.max_length}
        settings |= {name: getattr(self.config, name) for name in _STORED}
        image = write_image_config(self.image_settings)
        if image["do_resize"] and not image["do_center_crop"] and self.image_settings.mode == "exact":
            unused = ("do_center_crop", "crop_size")
            image = {key: value for key, value in image.items() if key not in unused}
            image |= {"image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor"}
        for file, content in ((_SETTINGS_FILE, settings), (_IMAGE_FILES[0], image)):
            write_atomically(directory / file, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, directory: str | Path, model: Any = None, tokenizer: str | Path | None = None) -> Processor:
        """Reads a folder written by `save`, a Hugging Face folder, or one with a tokenizer alone.

        Of Hugging Face's, the model class in config.json tells the task, and texts are not cleaned. Beside the authors'
        .pth files lies a vocabulary at most: `model`, the architecture, then tells the task and the pictures' size, and
        texts are cleaned as they cleaned them. Augmentation belongs to a training run and is not stored.

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
        config = _stored_config(directory, model, has_images=image_file is not None)
        if image_file is not None:
            config = dataclasses.replace(config, image=_image_settings(image_file))
        return cls(load(words) if has_tokenizer else None, config)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("this processor has no tokenizer, so it cannot take texts")
        return self.tokenizer

    def _encode(self, text: str, length: int) -> dict[str, np.ndarray]:
        batch = self._tokenizer()([text], max_length=length, padding="max_length")
        return {key: value[0] for key, value in batch.items()}

    def _images(
        self, value: Any, name: str, rng: np.random.Generator | None = None, *, stored: bool = False
    ) -> np.ndarray:
        """One image [H, W, 3], or several [N, H, W, 3]; each is varied on its own."""
        if isinstance(value, (list, tuple)):
            if not value:
                raise UserError(f"{name}: an empty list of images")
            rows = [self._images(item, f"{name}[{index}]", rng, stored=stored) for index, item in enumerate(value)]
            if len({row.shape for row in rows}) > 1 or rows[0].ndim != 3:
                raise UserError(f"{name}: expected images of one size, found {[row.shape for row in rows]}")
            return np.stack(rows)
        if stored and isinstance(value, (str, Path)):  # a record must not choose which file is opened
            raise UserError(f"{name} must be encoded bytes, found a path")
        picture, normalise = open_image(value, name), self.config.normalise or rng is None
        if rng is not None and self.config.augment is not None:
            return augment(picture, self.image_settings, self.config.augment, rng, normalise=normalise)
        return process(picture, self.image_settings, normalise=normalise)


def _with_modes(tokenizer: Tokenizer) -> Tokenizer:
    """Appends [DEC] and [ENC] where they lack, after checking that rows are `[CLS] text [SEP]` with padding."""
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    if None in (*ends, tokenizer.pad_id) or [part for part, _ in tokenizer.single] != [ends[0], "A", ends[1]]:
        raise UserError(f"BLIP needs BERT's tokenizer, with rows of [CLS] text [SEP]; found {tokenizer.single}")
    if tokenizer.token_id(DEC) is not None and tokenizer.token_id(ENC) is not None:
        return tokenizer
    if not isinstance(tokenizer, LibraryTokenizer):
        raise UserError(f"{DEC} and {ENC} cannot be added to a {type(tokenizer).__name__}")
    return tokenizer.extended((DEC, ENC))


def _stored_config(directory: Path, model: Any, has_images: bool) -> ProcessorConfig:
    path = directory / _SETTINGS_FILE
    if not path.is_file():
        names = read_json_if_present(directory / "config.json").get("architectures")
        name = str(names[0]) if isinstance(names, list) and names else ""
        if model is not None and not has_images and not name.startswith("Blip"):
            return ProcessorConfig.for_model(model)
        return ProcessorConfig(task=_TASKS_OF_CLASSES.get(name, "pretrain"), clean=False)
    settings = read_json(path)
    if settings.pop("format_version", 1) != 1:
        raise UserError(f"{path}: another format version, expected 1")
    try:
        return build(ProcessorConfig, settings, "processor")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _image_settings(path: Path) -> ImageSettings:
    config = read_json(path)
    nested = config.get("image_processor")
    config = dict(nested) if isinstance(nested, Mapping) else config
    # Published files carry keys of another model's processor that were never read, and BLIP never crops.
    config = {key: value for key, value in config.items() if key not in ("do_pad", "size_divisor")}
    if config.get("image_processor_type") != "CLIPImageProcessor":
        config |= {"do_center_crop": False}
    settings = read_image_config({"size": {"height": 384, "width": 384}} | config, str(path), square=True)
    if isinstance(settings.size, tuple) and settings.size[0] == settings.size[-1]:
        return dataclasses.replace(settings, size=settings.size[0])
    return settings
