"""The settings of BLIP's processor."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from vlm.data.augment import AugmentSettings
from vlm.data.image import ImageSettings
from vlm.errors import UserError

Task = Literal["pretrain", "retrieval", "caption", "vqa", "nlvr", "classification", "dialog"]
LIMITS: dict[str, tuple[int, int]] = {
    "pretrain": (30, 30), "retrieval": (35, 30), "caption": (40, 30),
    "vqa": (35, 50), "nlvr": (64, 40), "classification": (64, 40), "dialog": (256, 40),
}  # fmt: skip
"""By task: tokens of a row, special ones included, and words of a cleaned text. The authors never cut NLVR2's 40 words;
rows of one length hold 64 tokens of them. Of a dialog's earlier rounds those are read for which a row has room."""
_TASKS: dict[str, tuple[Task, ...]] = {
    "classification": ("classification", "nlvr"),
    "matching": ("classification",),
}
"""By objective: the tasks whose examples it learns from, where they have another name than the objective itself."""
_PARTS: dict[str, tuple[str, ...]] = {
    "pretrain": ("vision", "text", "shared_decoder", "projection_dim", "temperature", "itm"),
    "retrieval": ("vision", "text", "projection_dim", "temperature", "itm"),
    "caption": ("vision", "generative"),
    "vqa": ("vision", "text", "decoder"),
    "classification": ("vision", "text", "num_labels"),
    "matching": ("vision", "text", "itm"),
    "dialog": ("vision", "text", "itm"),
}
"""By objective: what a model must have."""


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """The processor's section of a configuration.

    Attributes:
        tokenizer: folder or file of a BERT vocabulary that `vlm.tokenizers.load` reads; None: not needed.
        task: what examples are made for (see `Processor.example`).
        image: how pictures become arrays; BLIP squashes them to a square (VQA: 480).
        augment: random variation of pictures in training; None: pictures as in evaluation. The published one is
            {"scale": (0.5, 1.0), "flip": 0.5, "rand_augment": 2}, in pretraining with scale (0.2, 1.0).
        max_length, max_words: length of token rows and words of a cleaned text; None: the task's (`LIMITS`).
        clean: lower-case texts without certain marks (`data/text.py`), as the authors train and evaluate. Hugging
            Face's processors do not; neither do processors read from their folders.
        prompt: what captions begin with in training; no loss falls on it.
        max_answers, answer_length: different answers kept of a question, the most frequent ones, and tokens of each.
        single_answer_weight: of an answer that is a string, as Visual Genome's, not a list of several people's.
        caption_length: tokens of the caption that a dialog is about.
        num_labels: classes; every label must be one of them. None: in training those that the model tells apart.
        normalise: False makes training examples with uint8 pictures, that the training step normalises on the device.
    """

    tokenizer: str | None = None
    task: Task = "pretrain"
    image: ImageSettings = dataclasses.field(default_factory=lambda: ImageSettings(384, None, mode="exact"))
    augment: AugmentSettings | None = None
    max_length: int | None = None
    max_words: int | None = None
    clean: bool = True
    prompt: str = "a picture of "
    max_answers: int = 10
    answer_length: int = 16
    single_answer_weight: float = 0.2
    caption_length: int = 40
    num_labels: int | None = None
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.task not in LIMITS:
            raise UserError(f"task: expected one of {', '.join(LIMITS)}, found {self.task!r}")
        lengths = {"max_length": 3, "max_words": 1, "max_answers": 1, "answer_length": 3, "caption_length": 3}
        lengths["num_labels"] = 1
        for name, least in lengths.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise UserError(f"{name}: expected a whole number of at least {least}, found {value!r}")
        if not self.single_answer_weight > 0:
            raise UserError(f"single_answer_weight: expected a positive number, found {self.single_answer_weight}")

    @classmethod
    def for_model(cls, model: Any) -> ProcessorConfig:
        """The authors' settings for an architecture: pictures of its size, and what its task's texts are cut to."""
        if model.num_images == 2:
            task: Task = "nlvr"
        elif model.num_labels is not None:
            task = "classification"
        elif model.projection_dim is not None:
            task = "pretrain" if model.generative is not None else "retrieval"
        elif model.itm:
            task = "dialog"
        else:
            task = "vqa" if model.text is not None and model.decoder is not None else "caption"
        side = 384 if model.vision is None else model.vision.image_size
        words = None if model.video == "none" else 40  # of MSR-VTT's captions
        return cls(task=task, image=ImageSettings(side, None, mode="exact"), max_words=words)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.max_length if self.max_length is not None else LIMITS[self.task][0]

    @property
    def words(self) -> int:
        """Words of a cleaned text."""
        return self.max_words or LIMITS[self.task][1]

    def for_run(self, model: Any, loss: Any) -> ProcessorConfig:
        """These settings in a run that trains `model` for `loss`: labels are the classes of what learns from them."""
        return self if self.num_labels else dataclasses.replace(self, num_labels=_classes(model, loss))

    def check(self, model: Any, loss: Any) -> None:
        """Whether the examples fit the architecture and the objective of a run.

        Args:
            model: the family's architecture; loss: its loss settings.

        Raises:
            UserError: a model without a part that the objective trains, examples of another task, pictures of another
                size than the image encoder's, rows longer than a stack's positions, ids outside its vocabulary.
        """
        for name in _PARTS[loss.objective]:
            if getattr(model, name) in (None, False):
                found = "shared_decoder" if name == "generative" else name
                raise UserError(f"config.loss.objective: {loss.objective!r} needs config.model.{found}")
        tasks = _TASKS.get(loss.objective, (loss.objective,))
        if self.task not in tasks:
            expected = f"objective {loss.objective!r} expects {' or '.join(tasks)}"
            raise UserError(f"config.processor.task: {expected}, found {self.task}")
        if (self.task == "nlvr") != (model.num_images == 2):
            images = f"task {self.task!r} expects {1 + (self.task == 'nlvr')}"
            raise UserError(f"config.model.num_images: {images}, found {model.num_images}")
        if self.num_labels not in (None, _classes(model, loss)):
            expected = f"expected the {_classes(model, loss)} classes of objective {loss.objective!r}"
            raise UserError(f"config.processor.num_labels: {expected}, found {self.num_labels}")
        side, size = model.vision.image_size, self.image.output_size
        if size != (side, side):
            found = "pictures of any size" if size is None else "{} x {}".format(*size)
            raise UserError(
                f"config.processor.image: expected the {side} x {side} of config.model.vision, found {found}"
            )
        if self.task == "dialog" and model.text.hidden_size != model.vision.hidden_size:
            expected = f"dialog expects the {model.vision.hidden_size} of config.model.vision"
            raise UserError(f"config.model.text.hidden_size: {expected}, found {model.text.hidden_size}")
        self._check_stacks(model)

    def _check_stacks(self, model: Any) -> None:
        """Lengths and ids against each text stack: all of them read [CLS] and [SEP], the encoder [ENC] too."""
        lengths = {"text": {"max_length": self.length}, "decoder": {"max_length": self.length}}
        if self.task == "vqa":
            lengths["decoder"] = {"answer_length": self.answer_length}
        if self.task == "dialog":
            lengths["text"]["caption_length"] = self.caption_length
        for name, stack in (("text", model.text), ("decoder", model.decoder)):
            if stack is None:
                continue
            for setting, value in lengths[name].items():
                if value > stack.max_length:
                    expected = f"expected at most the {stack.max_length} positions of config.model.{name}"
                    raise UserError(f"config.processor.{setting}: {expected}, found {value}")
            ids = {"cls_id", "sep_id", "pad_id"}
            ids |= {"enc_id"} if name == "text" and model.encoder_token == "enc" else set()  # noqa: S105
            ids |= {"bos_id"} if stack is model.generative else set()
            for key in sorted(ids):
                if not 0 <= getattr(model, key) < stack.vocab_size:
                    expected = f"expected an id of the {stack.vocab_size} tokens of config.model.{name}"
                    raise UserError(f"config.model.{key}: {expected}, found {getattr(model, key)}")


def _classes(model: Any, loss: Any) -> int | None:
    """How many classes the objective tells apart; the matching head knows right and wrong."""
    return 2 if loss.objective == "matching" else model.num_labels
