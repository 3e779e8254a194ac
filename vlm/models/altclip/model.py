"""AltCLIP (Chen et al. 2022, arXiv 2211.06679): CLIP whose text tower is a multilingual XLM-R with a small head."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.encoders.bert import Bert, BertConfig
from vlm.encoders.clip_text import ClipText, ClipTextConfig
from vlm.encoders.output import EncoderOutput
from vlm.encoders.vit import ViT, ViTConfig
from vlm.layers.arrays import AnyArray, exact
from vlm.layers.linear import Linear, constrain, param
from vlm.layers.lm_head import LMHead
from vlm.layers.norms import LayerNorm, normalise
from vlm.layers.transformer import first_tokens
from vlm.losses import contrastive
from vlm.strict import at_least, unused

normal = nn.initializers.normal


@dataclasses.dataclass(frozen=True)
class AltCLIPConfig:
    """Architecture; the defaults are the published AltCLIP's (ViT-L/14 and XLM-R large).

    A model may consist of one tower only: then the other's config, and what belongs to it, is None.

    Attributes:
      clip_text: CLIP's own text tower in place of `text`; the model is then a plain CLIP (the teacher of stage 1).
      project_dim: width of the text head's output, the teacher's text width.
      projection_dim: width of the joint space; None leaves out both projections and the temperature.
      logit_scale_init: initial log temperature, ln(1/0.07).
      text_norm, text_transformation: the head's LayerNorm (HF calls it `pre_LN`) and linear map.
      text_transformation_pre: a second linear map for the last layer but one (AltDiffusion-m18).
      lm_head: a masked-language-modelling head on the text tower, tied to its token embedding. `clip_text` has neither
        this nor the second linear map.
    """

    vision: ViTConfig | None = ViTConfig(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096, patch_size=14)
    text: BertConfig | None = BertConfig()
    clip_text: ClipTextConfig | None = None
    project_dim: int = 768
    projection_dim: int | None = 768
    logit_scale_init: float = 2.6592
    text_norm: bool = True
    text_transformation: bool = True
    text_transformation_pre: bool = False
    lm_head: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "project_dim", "projection_dim")
        towers = [name for name in ("vision", "text", "clip_text") if getattr(self, name) is not None]
        if not towers or {"text", "clip_text"} <= set(towers):
            raise ValueError(f"model: expected a vision tower and/or one text tower, found {towers or 'none'}")
        if self.vision is not None and not self.vision.class_token and self.projection_dim is not None:
            raise ValueError("vision.class_token: vision_projection reads its state; expected True, found False")
        if self.clip_text is not None:  # converted files say False of text_norm and text_transformation
            unused(self, "CLIP's own text tower", "text_transformation_pre", "lm_head")


@flax.struct.dataclass
class AltCLIPOutput:
    """Outputs with Hugging Face's names; a field is None where its input was not given.

    Attributes:
      loss: float[], the symmetric contrastive loss, on request.
      logits_per_image, logits_per_text: [Bi, Bt] and its transpose, exp(logit_scale) · cosine.
      text_embeds, image_embeds: [B, projection_dim], L2-normalised.
      text_model_output: last_hidden_state is the head's output for every token [B, L, project_dim], pooler_output its
        first token; hidden_states are the encoder's own [layers + 1, B, L, E], the last one before the head.
      vision_model_output: last_hidden_state [B, 1 + P, E] is not normalised; pooler_output is its normed class token.
    """

    loss: jax.Array | None = None
    logits_per_image: jax.Array | None = None
    logits_per_text: jax.Array | None = None
    text_embeds: jax.Array | None = None
    image_embeds: jax.Array | None = None
    text_model_output: EncoderOutput | None = None
    vision_model_output: EncoderOutput | None = None


class AltCLIP(nn.Module):
    """Two towers and their projections into one space."""

    config: AltCLIPConfig

    def setup(self) -> None:
        config = self.config
        linear = partial(Linear, axes=("embed", "projection"))
        if config.vision is not None:
            self.vision = ViT(config.vision)
        if config.text is not None:
            text, dtype = config.text, jnp.dtype(config.text.dtype)
            self.text = Bert(text)
            if config.text_norm:
                self.text_norm = LayerNorm(text.norm_eps, dtype)
            if config.text_transformation:
                self.text_transformation = linear(config.project_dim, dtype=dtype)
            if config.text_transformation_pre:
                self.text_transformation_pre = linear(config.project_dim, dtype=dtype)
            if config.lm_head:
                self.lm_head = LMHead(text.vocab_size, text.norm_eps, dtype=text.dtype)
        elif config.clip_text is not None:
            self.text = ClipText(config.clip_text)
        if config.projection_dim is None:
            return
        project = partial(linear, config.projection_dim, use_bias=False)
        if config.vision is not None:
            init = normal(config.vision.hidden_size**-0.5)
            self.vision_projection = project(kernel_init=init, dtype=jnp.dtype(config.vision.dtype))
        text = config.text or config.clip_text
        if text is not None:
            init = normal((config.project_dim if config.text else text.hidden_size) ** -0.5)
            self.text_projection = project(kernel_init=init, dtype=jnp.dtype(text.dtype))
        if config.vision is not None and text is not None:
            constant = nn.initializers.constant(config.logit_scale_init)
            self.logit_scale = param(self, "logit_scale", constant, (), ())

    def __call__(
        self,
        image: Float[AnyArray, "bi h w 3"] | None = None,
        tokens: Int[AnyArray, "bt l"] | None = None,
        mask: Bool[AnyArray, "bt l"] | None = None,
        *,
        token_embeds: Float[AnyArray, "bt l e"] | None = None,
        positions: Int[AnyArray, "bt l"] | None = None,
        token_types: Int[AnyArray, "bt l"] | None = None,
        deterministic: bool = True,
        return_loss: bool = False,
        interpolate_positions: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> AltCLIPOutput:
        """Encodes images, texts or both; with both also their similarities.

        Args:
          image: normalised pixels; mask: true at real tokens; token_embeds: in place of tokens.
          return_loss: symmetric InfoNCE over the batch, row i of the images belonging to row i of the texts.
          interpolate_positions: accept images of another size than the configured one.
        """
        flags: dict[str, Any] = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        vision = text = image_embeds = text_embeds = None
        if image is not None:
            vision = self.vision(
                image, deterministic=deterministic, interpolate_positions=interpolate_positions, **flags
            )
            image_embeds = self._embed("vision", vision)
        if tokens is not None or token_embeds is not None:
            given = {"token_embeds": token_embeds, "positions": positions, "token_types": token_types}
            flags |= {name: value for name, value in given.items() if value is not None}
            encode: Any = self.text
            text = self._text_head(encode(tokens, mask, deterministic=deterministic, **flags))
            text_embeds = self._embed("text", text)
            if self.is_initializing():
                self._init_other_heads()
        logits = loss = None
        if image_embeds is not None and text_embeds is not None:
            scale = jnp.exp(self.logit_scale)
            logits = scale * jnp.dot(text_embeds, image_embeds.T, precision=exact(text_embeds))
            loss = contrastive(image_embeds, text_embeds, scale) if return_loss else None
        per_image = None if logits is None else logits.T
        return AltCLIPOutput(loss, per_image, logits, text_embeds, image_embeds, text, vision)

    def encode_image(
        self, image: Float[AnyArray, "b h w 3"], *, deterministic: bool = True, interpolate_positions: bool = False
    ) -> Float[Array, "b p"]:
        """Image embeddings in the joint space, not normalised."""
        flags: dict[str, Any] = {"deterministic": deterministic, "interpolate_positions": interpolate_positions}
        return self.vision_projection(self.vision(image, outputs_at=first_tokens(image), **flags).pooler_output)

    def encode_text(
        self,
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"] | None = None,
        packing: Int[AnyArray, "g t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b p"]:
        """Text embeddings in the joint space, not normalised; with `packing`, computed without the padding."""
        return self.text_projection(self.encode_text_pooled(tokens, mask, packing, deterministic=deterministic))

    def encode_text_pooled(
        self,
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"] | None = None,
        packing: Int[AnyArray, "g t"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b e"]:
        """What `text_projection` projects: the head's output at the first token, CLIP's end-of-text state."""
        encode: Any = self.text
        read = {"pooled_only": True} if self.config.text is None else {"outputs_at": first_tokens(tokens)}
        return self._text_head(encode(tokens, mask, packing=packing, deterministic=deterministic, **read)).pooler_output

    def encode_tokens(
        self,
        tokens: Int[AnyArray, "b l"],
        mask: Bool[AnyArray, "b l"] | None = None,
        *,
        layer: Literal["last", "penultimate"] = "last",
    ) -> Float[Array, "b l e"]:
        """One vector per token, as AltDiffusion conditions on [B, L, project_dim].

        "last": the transformation of the last encoder state, without the head's norm (AltDiffusion, m9).
        "penultimate": norm, then `text_transformation_pre`, of the last layer but one (AltDiffusion-m18).
        """
        output = self.text(tokens, mask, output_hidden_states=layer == "penultimate")
        if layer == "last":
            return self.text_transformation(output.last_hidden_state)
        if not (self.config.text_transformation_pre and self.config.text_norm):
            raise ValueError("encode_tokens: layer='penultimate' needs text_transformation_pre and text_norm")
        return self.text_transformation_pre(self.text_norm(output.hidden_states[-2]))

    def lm_logits(
        self, tokens: Int[AnyArray, "b l"], mask: Bool[AnyArray, "b l"] | None = None, *, deterministic: bool = True
    ) -> Float[Array, "b l v"]:
        """Masked-language-modelling logits of the text tower."""
        return self.lm_decode(self.encode_states(tokens, mask, deterministic=deterministic))

    def encode_states(
        self, tokens: Int[AnyArray, "b l"], mask: Bool[AnyArray, "b l"] | None = None, *, deterministic: bool = True
    ) -> Float[Array, "b l e"]:
        """The text encoder's last hidden states, before AltCLIP's head."""
        return self.text(tokens, mask, deterministic=deterministic).last_hidden_state

    def lm_decode(self, hidden: Float[AnyArray, "*b e"]) -> Float[Array, "*b v"]:
        """Masked-language-modelling logits of text encoder states."""
        return self.lm_head(hidden, self.text.token_embedding.embedding)

    def _text_head(self, encoded: EncoderOutput) -> EncoderOutput:
        if self.config.text is None:
            return encoded
        hidden = encoded.last_hidden_state
        hidden = self.text_norm(hidden) if self.config.text_norm else hidden
        hidden = self.text_transformation(hidden) if self.config.text_transformation else hidden
        hidden = constrain(hidden, "batch", "length", "embed_activation")
        return dataclasses.replace(encoded, last_hidden_state=hidden, pooler_output=hidden[:, 0])

    def _init_other_heads(self) -> None:
        """Creates the parameters of heads that the joint forward pass does not use."""
        if self.config.text is not None:
            hidden = jnp.zeros((1, 1, self.config.text.hidden_size))
            if self.config.text_transformation_pre:
                self.text_transformation_pre(hidden)
            if self.config.lm_head:
                self.lm_head(hidden, self.text.token_embedding.embedding)

    def _embed(self, tower: str, output: EncoderOutput) -> Float[Array, "b p"] | None:
        if self.config.projection_dim is None:
            return None
        return normalise(getattr(self, f"{tower}_projection")(output.pooler_output))
