"""BLIP's architecture: which parts a model has, and the token ids it writes."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vlm.encoders.vit import ViTConfig
from vlm.fusion.med import MedConfig
from vlm.strict import at_least

VIT = ViTConfig(
    patch_size=16,
    activation="gelu",
    norm_eps=1e-6,
    patch_bias=True,
    input_norm=False,
    output_norm="all",
    init="normal",
)
"""ViT-B/16 as BLIP uses it (epsilon of the original code; Hugging Face's configurations say 1e-5)."""


@dataclasses.dataclass(frozen=True)
class BLIPConfig:
    """Architecture; the defaults are those of the published pretraining model with ViT-B.

    A model consists of the parts that are not None or False:

    ==================  ================  ==================  =============================================
    model               text stacks       projections         heads
    ==================  ================  ==================  =============================================
    pretraining         text, shared      yes, temperature    itm, lm
    retrieval           text              yes                 itm
    captioning          decoder                               lm
    question answering  text and decoder                      lm
    NLVR2               text              (num_images 2)      classifier (num_labels 2)
    classification      text                                  classifier
    HF's BlipModel      text with pooler  yes, logit_scale
    one tower           none, or no vision
    ==================  ================  ==================  =============================================

    Attributes:
      vision: the image encoder; None in a text stack saved alone.
      text: the encoder, for texts alone and grounded in an image.
      decoder: a decoder with parameters of its own; it reads the text encoder's states if there is a text encoder
        (question answering), image tokens otherwise.
      shared_decoder: `text` is the decoder as well, with a second self-attention in every layer.
      projection_dim: width of the joint space; None leaves out both projections.
      itm: the image-text matching head.
      temperature: initial value of the similarities' divisor, a parameter; None where there is none.
      logit_scale_init: initial log of the similarities' factor (HF's BlipModel), in place of `temperature`.
      num_labels: classes of the classifier.
      num_images: 2 gives every text layer a cross-attention for each image (NLVR2).
      average_layers: with two images, how many layers average what they read, the others mapping both to one
        vector; None: half of them (the published model: 6 of 12).
      video: how an image [B, N, H, W, 3] of N frames becomes what texts read: its frames' tokens one after another, or
        their average. In the joint space a video is the average of its frames.
      encoder_token: "enc" writes [ENC] over [CLS] for the grounded encoder; "cls" leaves it (Hugging Face).
      tied_lm_head: the output kernel is the decoder's token embedding.
      bos_id, enc_id: [DEC] and [ENC], written over a leading `cls_id`.
    """

    vision: ViTConfig | None = VIT
    text: MedConfig | None = MedConfig()
    decoder: MedConfig | None = None
    shared_decoder: bool = True
    projection_dim: int | None = 256
    projection_bias: bool = True
    itm: bool = True
    temperature: float | None = 0.07
    logit_scale_init: float | None = None
    num_labels: int | None = None
    num_images: int = 1
    average_layers: int | None = None
    video: Literal["none", "concatenate", "average"] = "none"
    encoder_token: Literal["enc", "cls"] = "enc"  # noqa: S105
    tied_lm_head: bool = True
    bos_id: int = 30522
    enc_id: int = 30523
    sep_id: int = 102
    cls_id: int = 101
    pad_id: int = 0

    @property
    def generative(self) -> MedConfig | None:
        """The stack that decodes, if any."""
        return self.text if self.shared_decoder else self.decoder

    def __post_init__(self) -> None:
        at_least(1, self, "projection_dim", "num_labels")
        for message in self._problems():
            raise ValueError(f"model.{message}")

    def _problems(self) -> list[str]:
        text, decoder, problems = self.text, self.decoder, []
        if self.vision is None and text is None and decoder is None:
            problems.append("vision: expected an image encoder or a text stack, found neither")
        if self.shared_decoder and (text is None or decoder is not None):
            problems.append("shared_decoder: expected text and no decoder")
        for name in ("itm", "projection_dim", "num_labels"):
            if (text is None or self.vision is None) and getattr(self, name):
                missing = "a text encoder" if text is None else "an image encoder"
                problems.append(f"{name}: expected {missing} for it, found none")
        if self.projection_dim is None and (self.temperature is not None or self.logit_scale_init is not None):
            problems.append("temperature, logit_scale_init: expected None without projection_dim")
        if self.temperature is not None and self.logit_scale_init is not None:
            problems.append("temperature: expected None beside logit_scale_init")
        if self.num_images not in (1, 2) or (
            self.num_images == 2 and (self.num_labels is None or self.video != "none")
        ):
            problems.append(f"num_images: expected 1, or 2 with num_labels and without video, found {self.num_images}")
        read = ("text", text) if text else ("vision", self.vision)
        for name, stack, (source, encoder) in (("text", text, ("vision", self.vision)), ("decoder", decoder, read)):
            if stack is not None and encoder is not None and stack.context_size != encoder.hidden_size:
                wanted = f"expected {source}.hidden_size={encoder.hidden_size}"
                problems.append(f"{name}.context_size: {wanted}, found {stack.context_size}")
        return problems
