"""The settings of FLAVA's processor."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from vlm.data.augment import AugmentSettings
from vlm.data.block_masking import BlockSettings
from vlm.data.image import ImageSettings
from vlm.errors import UserError

Task = Literal["pretrain", "classification", "regression", "soft_labels"]
_COLOURS = ("flip", "brightness", "contrast", "saturation", "hue", "grayscale", "rand_augment")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """The processor's section of a configuration.

    Attributes:
        tokenizer: folder or file of a BERT vocabulary that `vlm.tokenizers.load` reads; None: not needed.
        task: what examples are made for, as `loss.objective` (see `Processor.example`).
        image: how pictures become arrays; FLAVA squashes them to a square (VQA: 480).
        augment: random variation of pictures in training; None: pictures as in evaluation. Pretraining crops them, with
            scale (0.9, 1.0), and does nothing else: both pictures below come from one crop.
        max_length: length of token rows, and `text_length` of those of training examples without a picture.
        token_types: tell the second sentence of a pair from the first; False: both are 0, as in torchmultimodal.
        patch_size: pixels along the side of a patch. mask_patches, blocks: how many are hidden in pretraining, how.
        codebook_size: pixels along the side of the codebook's picture, 8 for each patch; None: it is not made, as
            where labels are computed beforehand (`config.data.codebook_cache`).
        mlm_probability: share of tokens hidden in pretraining; of pairs whole words, never more than this.
        max_masked_tokens: no more are hidden of a text alone; None: no limit.
        itm_probability: share of pairs that get the caption of another example in pretraining; 0: none, no labels.
        num_labels: classes that "classification" knows; every label must be one of them. None: in training the
            classifier's.
        answers: JSON file with the list of answers that "soft_labels" scores; num_answers: how many there must be.
        normalise: False makes training examples with uint8 pictures, that the training step normalises on the device.
    """

    tokenizer: str | None = None
    task: Task = "pretrain"
    image: ImageSettings = dataclasses.field(default_factory=lambda: ImageSettings(224, None, mode="exact"))
    augment: AugmentSettings | None = None
    max_length: int = 77
    text_length: int = 512
    token_types: bool = True
    patch_size: int = 16
    mask_patches: int = 75
    blocks: BlockSettings = dataclasses.field(default_factory=BlockSettings)
    codebook_size: int | None = 112
    mlm_probability: float = 0.15
    max_masked_tokens: int | None = None
    itm_probability: float = 0.1
    num_labels: int | None = None
    answers: str | None = None
    num_answers: int = 3129
    normalise: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_length", 3), ("text_length", 3), ("patch_size", 1), ("mask_patches", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        for name in ("num_labels", "max_masked_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, found {value}")
        for name in ("mlm_probability", "itm_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}: expected a share in [0, 1), found {getattr(self, name)}")
        size = self.image.output_size
        if size is not None and any(side % self.patch_size for side in size):
            raise UserError(f"patch_size: expected a divisor of the image's {size}, found {self.patch_size}")
        varied = [name for name in _COLOURS if self.augment is not None and getattr(self.augment, name)]
        if self.task == "pretrain" and varied:
            raise UserError(f"augment: pretraining only crops pictures, found {varied[0]}")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Patches of a picture."""
        size = self.image.output_size
        return size and (size[0] // self.patch_size, size[1] // self.patch_size)

    def with_image(self, image: ImageSettings) -> ProcessorConfig:
        """These settings for pictures of another size: patches stay as large, and so does the codebook's of each."""
        changed = dataclasses.replace(self, image=image)
        if self.codebook_size is None or self.grid is None or changed.grid is None:
            return changed
        return dataclasses.replace(changed, codebook_size=self.codebook_size // self.grid[0] * changed.grid[0])

    def for_run(self, model: Any, loss: Any) -> ProcessorConfig:
        """These settings in a run that trains `model`: labels are its classifier's classes; 1 stands for a number."""
        classes = model.classifier.num_labels if self.task == "classification" and model.classifier else 1
        return self if self.num_labels or classes == 1 else dataclasses.replace(self, num_labels=classes)

    def check(self, model: Any, loss: Any) -> None:
        """Whether the examples fit the architecture and the objective of a run.

        Args:
            model: the family's architecture; loss: its loss settings.

        Raises:
            UserError: another number of classes than the classifier has, or more hidden patches or tokens in a row than
                the objective predicts.
        """
        for name, (setting, most) in self._hidden().items():
            if (bound := getattr(loss, name, None)) is not None and bound < most:
                expected = f"expected at least {most}, as many as {setting} allows to hide"
                raise UserError(f"config.loss.{name}: {expected}, found {bound}")
        classes = model.classifier and model.classifier.num_labels
        if self.task == "classification" and None not in (classes, self.num_labels) and classes != self.num_labels:
            expected = f"expected the {classes} of config.model.classifier"
            raise UserError(f"config.processor.num_labels: {expected}, found {self.num_labels}")

    def _hidden(self) -> dict[str, tuple[str, int]]:
        """By the setting of the objective that has to be as large: what decides on it, and the most hidden in a row."""
        section, hidden = "config.processor", {}
        if self.task == "pretrain" and self.mask_patches:
            hidden["max_masked_patches"] = (f"{section}.mask_patches", self.mask_patches)
        if self.task == "pretrain" and self.mlm_probability:
            tokens = min(self.max_masked_tokens or self.text_length, self.text_length - 2)
            hidden["max_masked_tokens"] = (f"{section}.max_masked_tokens", tokens)
            words = max(1, round(self.max_length * self.mlm_probability))
            hidden["max_masked_words"] = (f"{section}.mlm_probability", words)
        return hidden
