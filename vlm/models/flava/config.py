"""FLAVA's architecture: which parts a model has."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vlm.encoders.bert import BertConfig
from vlm.encoders.dvae import DVAEConfig
from vlm.encoders.vit import ViTConfig
from vlm.fusion.multimodal import FusionConfig
from vlm.layers.mlp import Activation
from vlm.strict import at_least

VIT = ViTConfig(
    patch_size=16,
    activation="gelu",
    norm_eps=1e-12,
    patch_bias=True,
    input_norm=False,
    output_norm="all",
    mask_token=True,
    pooler=True,
    init="normal",
)
"""FLAVA's image encoder, ViT-B/16.

Hugging Face's and torchmultimodal's random class tokens and positions are zeros. The first norm divides them by the
root of its epsilon, and their gradient is a million times too large; here they start at N(0, 0.02) like all else.
"""

BERT = BertConfig(
    vocab_size=30522,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    mlp_dim=3072,
    max_length=512,
    type_vocab_size=2,
    pad_id=0,
    positions="absolute",
    pre_norm=True,
    norm_eps=1e-12,
    pooler=True,
    dropout_rate=0.0,
    attention_dropout_rate=0.0,
)
"""FLAVA's text encoder: BERT base with pre-norm layers and a norm after the last."""


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A head on one encoder's class token: Linear, activation, dropout, Linear.

    Attributes:
      num_labels: width of its output; 1 for regression.
      input: whose class token is read, after the final norm. "multimodal" is the fusion of unmasked inputs.
    """

    num_labels: int
    input: Literal["image", "text", "multimodal"] = "multimodal"
    hidden_size: int = 768
    activation: Activation = "relu"
    dropout_rate: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, self, "num_labels", "hidden_size")


@dataclasses.dataclass(frozen=True)
class FLAVAConfig:
    """Architecture; the defaults are the published model's. A part that is None is left out.

    Attributes:
      fusion: the multimodal encoder. It comes with linear maps from the unimodal encoders present.
      projection_dim: width of the joint space; None leaves out its projections and the temperature. The paper's table
        says 512, the released weights have 768.
      heads: the heads of pretraining: masked prediction on each encoder's states, and matching.
      image_vocab_size: visual words that the image heads predict.
      codebook: the encoder that names the visual word of every patch; None where labels are computed beforehand.
      mask_text_padding: whether the fusion encoder leaves out padding. False attends to it, as torchmultimodal and
        early versions of Hugging Face's code do, and probably the original training did.
      head_norm_eps: of the heads of masked prediction; None: the encoders' (Hugging Face). torchmultimodal has 1e-5.
      classifier: a head for fine-tuning.
    """

    vision: ViTConfig | None = VIT
    text: BertConfig | None = BERT
    fusion: FusionConfig | None = FusionConfig()
    projection_dim: int | None = 768
    logit_scale_init: float = 2.6592
    heads: bool = True
    image_vocab_size: int = 8192
    codebook: DVAEConfig | None = DVAEConfig()
    mask_text_padding: bool = True
    head_norm_eps: float | None = None
    classifier: ClassifierConfig | None = None

    @property
    def grid_side(self) -> int | None:
        """Patches along each side of the picture."""
        return None if self.vision is None else self.vision.image_size // self.vision.patch_size

    @property
    def codebook_size(self) -> int | None:
        """Pixels along each side of the codebook's picture: one visual word for every patch."""
        if self.codebook is None or self.grid_side is None:
            return None
        return self.grid_side * self.codebook.downsampling

    def __post_init__(self) -> None:
        at_least(1, self, "projection_dim", "image_vocab_size")
        at_least(0, self, "head_norm_eps")
        for message in self._problems():
            raise ValueError(f"model.{message}")

    def _problems(self) -> list[str]:
        vision, text, fusion, problems = self.vision, self.text, self.fusion, []
        if all(part is None for part in (vision, text, fusion, self.codebook)):
            problems.append("vision: expected at least one of vision, text, fusion and codebook, found none")
        if vision is not None and (vision.output_norm != "all" or not vision.class_token):
            problems.append("vision: expected output_norm='all' and a class token")
        if text is not None and not text.pre_norm:
            problems.append("text.pre_norm: expected True, found False")
        if self.codebook is not None and self.codebook.vocab_size != self.image_vocab_size:
            expected = f"expected the codebook's {self.codebook.vocab_size}"
            problems.append(f"image_vocab_size: {expected}, found {self.image_vocab_size}")
        if self.classifier is not None:
            needed = {"image": (vision,), "text": (text,), "multimodal": (vision, text, fusion)}
            if None in needed[self.classifier.input]:
                problems.append(f"classifier.input: the model has no {self.classifier.input!r} encoder")
        return problems
