"""BLIP (Li et al. 2022, arXiv 2201.12086): a ViT and one BERT used as text encoder, grounded encoder and decoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlm.encoders.output import EncoderOutput
from vlm.encoders.vit import ViT
from vlm.fusion.med import Med
from vlm.layers.arrays import AnyArray, exact
from vlm.layers.linear import Linear, param
from vlm.layers.lm_head import LMHead
from vlm.layers.norms import normalise
from vlm.losses import contrastive, cross_entropy
from vlm.models.blip.config import BLIPConfig
from vlm.models.blip.output import BLIPOutput
from vlm.models.blip.writing import Writing

Image = Float[AnyArray, "b ... h w 3"]  # pairs and videos have an axis after the batch
Tokens = Int[AnyArray, "b ... l"]  # so have several texts [B, A, L] for each image
Mask = Bool[AnyArray, "b ... l"] | None
Answers = Int[AnyArray, "b ... a"]
AnswerMask = Bool[AnyArray, "b ... a"] | None
Context = Float[AnyArray, "b ... m c"]
ContextMask = Bool[AnyArray, "b ... m"] | None


class Classifier(nn.Module):
    """Linear, ReLU, Linear on one vector per example."""

    num_labels: int
    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b e"]) -> Float[Array, "b k"]:
        dtype, axes = jnp.dtype(self.dtype), ("embed", "projection")
        hidden = jax.nn.relu(Linear(x.shape[-1], axes, dtype=dtype, name="dense")(x))
        return Linear(self.num_labels, axes, dtype=dtype, name="out")(hidden)


class BLIP(Writing, nn.Module):
    """The parts that the configuration names.

    Tokens start with [CLS]: the grounded encoder writes [ENC] over it (`encoder_token`), the decoder [DEC]. A row that
    starts with another token, and a vocabulary without the new one, are left as they are.

    With `decoding`, the decoder's parameters are laid out for `prefill` and `decode` (`vlm.generation.prepare`).
    """

    config: BLIPConfig
    decoding: bool = False

    def setup(self) -> None:
        config, text = self.config, self.config.text
        if config.vision is not None:
            self.vision = ViT(config.vision)
        if text is not None:
            layers = None
            if config.num_images == 2:
                layers = text.num_layers // 2 if config.average_layers is None else config.average_layers
            self.text = Med(text, config.shared_decoder, layers, self.decoding and config.shared_decoder)
        if config.decoder is not None:
            self.decoder = Med(config.decoder, decoding=self.decoding)
        if config.generative is not None:
            stack = config.generative
            self.lm_head = LMHead(stack.vocab_size, stack.norm_eps, stack.activation, config.tied_lm_head, stack.dtype)
        if text is None or config.vision is None:
            return
        axes, dtype = ("embed", "projection"), jnp.dtype(text.dtype)
        if config.projection_dim is not None:
            bias = config.projection_bias
            self.vision_projection = Linear(config.projection_dim, axes, bias, dtype=jnp.dtype(config.vision.dtype))
            self.text_projection = Linear(config.projection_dim, axes, bias, dtype=dtype)
        for name, value in (("temperature", config.temperature), ("logit_scale", config.logit_scale_init)):
            if value is not None:
                setattr(self, name, param(self, name, nn.initializers.constant(value), (), ()))
        if config.itm:
            self.itm_head = Linear(2, axes, dtype=dtype)
        if config.num_labels is not None:
            self.classifier = Classifier(config.num_labels, text.dtype)

    def __call__(
        self,
        image: Image | None = None,
        tokens: Tokens | None = None,
        mask: Mask = None,
        *,
        answer_tokens: Answers | None = None,
        answer_mask: AnswerMask = None,
        labels: Int[AnyArray, "bt ..."] | None = None,
        use_itm_head: bool = True,
        return_loss: bool = False,
        label_smoothing: float = 0.0,
        logits_to_keep: int = 0,
        interpolate_positions: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> BLIPOutput:
        """Everything that the model has to say about images and texts.

        Args:
          image: normalised pixels, [B, N, H, W, 3] for a pair of images or the frames of a video.
          tokens: captions, questions or statements; mask: true at real tokens.
          answer_tokens, answer_mask: [B, L], or [B, A, L] for several answers, of a model that answers questions.
            By default `labels`, with padding where they are negative.
          labels: decoder targets [B, L] aligned with the decoder's tokens (position t is predicted from those before
            t; -100: no target), or classes [B].
          use_itm_head: False compares in the joint space instead, every image with every text.
          return_loss: the symmetric contrastive loss of HF's BlipModel.
          label_smoothing: share of every target of `loss` that is spread over the classes or the vocabulary.
          logits_to_keep: the decoder's logits at the last so many positions only; 0 keeps all.
          interpolate_positions: accept images of another size than the configured one.
        """
        config = self.config
        outputs: dict[str, Any] = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs["deterministic"] = deterministic
        if self.is_initializing():
            self._init_parts()
        found: dict[str, Any] = {}
        if image is not None:
            found |= self._see(self.encode_image_states(image, interpolate_positions=interpolate_positions, **outputs))
        context = found.get("last_hidden_state")
        if tokens is not None and config.text is not None:
            compare = config.projection_dim is not None and not (config.itm and use_itm_head)
            found |= self._read(tokens, mask, None if compare else context, **outputs)
        if "text_embeds" in found and "image_embeds" in found:
            found |= self._compare(found["image_embeds"], found["text_embeds"], return_loss)
        if config.generative is not None and context is not None:
            answers = (answer_tokens, answer_mask)
            found |= self._speak(found, (tokens, mask), answers, labels, logits_to_keep, **outputs)
        if labels is not None and "logits" in found:
            found["loss"] = _loss(found["logits"], labels, label_smoothing)
        return BLIPOutput(**found)

    def encode_image_states(
        self,
        image: Image,
        *,
        interpolate_positions: bool = False,
        deterministic: bool = True,
        **outputs: bool,
    ) -> EncoderOutput:
        """Image tokens [B, 1 + P, Dv] and class token [B, Dv].

        Images [B, N, H, W, 3] give [B, 2, 1 + P, Dv] and [B, 2, Dv] for pairs; for the frames of a video the frames'
        tokens [B, N · (1 + P), Dv], or their average, and the average class token. Layers' states and attentions (on
        request: output_hidden_states, output_attentions) then have a second batch axis N.

        Raises:
          ValueError: no image encoder; another number of images, or another size, than the model is made for.
        """
        config, lead = self.config, image.shape[:-3]
        if config.vision is None:
            raise ValueError("image: this model has no image encoder")
        if len(lead) != 1 and (config.num_images == 1 and config.video == "none"):
            raise ValueError(f"image: expected [B, H, W, 3], found {list(image.shape)} (video='none')")
        if config.num_images == 2 and lead[1:] != (2,):
            raise ValueError(f"image: expected [B, 2, H, W, 3], found {list(image.shape)}")
        image = image.reshape(-1, *image.shape[-3:])
        flags: dict[str, Any] = {"deterministic": deterministic, **outputs}
        output = self.vision(image, interpolate_positions=interpolate_positions, **flags)
        if len(lead) == 1:
            return output
        states, pooled = (x.reshape(*lead, *x.shape[1:]) for x in (output.last_hidden_state, output.pooler_output))
        if config.video != "none":
            pooled = pooled.mean(1)
            states = states.mean(1) if config.video == "average" else states.reshape(lead[0], -1, states.shape[-1])
        layers = (output.hidden_states, output.attentions)
        return EncoderOutput(
            states, pooled, *(None if x is None else x.reshape(x.shape[0], *lead, *x.shape[2:]) for x in layers)
        )

    def encode_image(
        self,
        image: Image,
        *,
        interpolate_positions: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "b p"]:
        """Image (or video) embeddings in the joint space, not normalised."""
        flags = {"interpolate_positions": interpolate_positions, "deterministic": deterministic}
        return self.vision_projection(self.encode_image_states(image, **flags).pooler_output)

    def encode_text(self, tokens: Tokens, mask: Mask = None, *, deterministic: bool = True) -> Float[Array, "b p"]:
        """Text embeddings in the joint space, not normalised."""
        return self.text_projection(self.encode_text_states(tokens, mask, deterministic=deterministic).pooler_output)

    def encode_text_states(
        self, tokens: Tokens, mask: Mask = None, *, deterministic: bool = True, **outputs: bool
    ) -> EncoderOutput:
        """States of texts on their own, [B, L, E]."""
        flags: dict[str, Any] = {"deterministic": deterministic, **outputs}
        return self.text(tokens, mask, **flags)

    def encode_multimodal(
        self,
        tokens: Tokens,
        mask: Mask,
        context: Context,
        context_mask: ContextMask = None,
        *,
        deterministic: bool = True,
        **outputs: bool,
    ) -> EncoderOutput:
        """States of texts that read the context; several texts [B, A, L] for each context give B · A rows."""
        assert self.config.text is not None
        if self.config.encoder_token == "enc":  # noqa: S105
            tokens = self._start(tokens, self.config.enc_id, self.config.text.vocab_size)
        tokens, mask, context, context_mask = _rows(tokens, mask, context, context_mask)
        flags: dict[str, Any] = {"deterministic": deterministic, **outputs}
        return self.text(tokens, mask, context=context, context_mask=context_mask, **flags)

    def match(
        self,
        tokens: Tokens,
        mask: Mask,
        context: Context,
        context_mask: ContextMask = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b ... 2"]:
        """Matching logits of texts [B, L] (or of candidates [B, A, L]) and contexts; index 1: matched."""
        output = self.encode_multimodal(tokens, mask, context, context_mask, deterministic=deterministic)
        return self.itm_head(output.pooler_output).reshape(*tokens.shape[:-1], 2)

    def classify(
        self,
        tokens: Tokens,
        mask: Mask,
        context: Context,
        context_mask: ContextMask = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b ... k"]:
        """Class logits of texts and contexts (for NLVR2, index 1: true)."""
        output = self.encode_multimodal(tokens, mask, context, context_mask, deterministic=deterministic)
        return self.classifier(output.pooler_output).reshape(*tokens.shape[:-1], -1)

    def encode_dialog(
        self, image: Image, caption_tokens: Tokens, caption_mask: Mask = None, *, deterministic: bool = True
    ) -> tuple[Float[Array, "b m c"], Bool[Array, "b m"]]:
        """Context and mask of a visual dialog: the image's tokens, then the states of its caption.

        `match` scores candidate answers against it, each appended to the dialog so far (Li et al. 2022, section 5.5).

        Raises:
          ValueError: image and text encoder differ in width.
        """
        states = self.encode_image_states(image, deterministic=deterministic).last_hidden_state
        caption = self.encode_text_states(caption_tokens, caption_mask, deterministic=deterministic).last_hidden_state
        if states.shape[-1] != caption.shape[-1]:
            found = f"{states.shape[-1]} and {caption.shape[-1]}"
            raise ValueError(f"visual dialog: expected image and text states of one width, found {found}")
        mask = jnp.ones(caption.shape[:2], bool) if caption_mask is None else caption_mask
        mask = jnp.concatenate([jnp.ones(states.shape[:2], bool), mask], axis=1)
        return jnp.concatenate([states, caption], axis=1), mask

    def decode_states(
        self,
        tokens: Tokens,
        mask: Mask,
        context: Context,
        context_mask: ContextMask = None,
        *,
        deterministic: bool = True,
        **outputs: bool,
    ) -> EncoderOutput:
        """States of the decoder, each token seeing those before it; several texts [B, A, L] give B · A rows."""
        assert self.config.generative is not None
        tokens = self._start(tokens, self.config.bos_id, self.config.generative.vocab_size)
        tokens, mask, context, context_mask = _rows(tokens, mask, context, context_mask)
        flags: dict[str, Any] = {"deterministic": deterministic, **outputs}
        return self._decoder(tokens, mask, context=context, context_mask=context_mask, causal=True, **flags)

    def decode_logits(
        self,
        tokens: Tokens,
        mask: Mask,
        context: Context,
        context_mask: ContextMask = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "b ... l v"]:
        """Logits of the token after each position."""
        output = self.decode_states(tokens, mask, context, context_mask, deterministic=deterministic)
        return self.lm_logits(output.last_hidden_state).reshape(*tokens.shape, -1)

    def lm_logits(self, hidden: Float[AnyArray, "*b e"]) -> Float[Array, "*b v"]:
        """Vocabulary logits of decoder states."""
        return self.lm_head(hidden, self._decoder.token_embedding.embedding)

    @property
    def _decoder(self) -> Med:
        return self.text if self.config.shared_decoder else self.decoder

    def _start(self, tokens: Any, token: int, vocab_size: int) -> Any:
        """Writes `token` over a leading [CLS]."""
        if token >= vocab_size:
            return tokens
        first = jnp.where(tokens[..., :1] == self.config.cls_id, token, tokens[..., :1])
        return jnp.concatenate([first, tokens[..., 1:]], axis=-1)

    def _see(self, output: EncoderOutput) -> dict[str, Any]:
        states, pooled = output.last_hidden_state, output.pooler_output
        embeds = states if self.config.projection_dim is None else normalise(self.vision_projection(pooled))
        return {
            "image_embeds": embeds,
            "last_hidden_state": states,
            "hidden_states": output.hidden_states,
            "attentions": output.attentions,
            "vision_pooler_output": pooled,
            "vision_model_output": output,
        }

    def _read(self, tokens: Any, mask: Any, context: Any, **outputs: Any) -> dict[str, Any]:
        """The text encoder's part of `__call__`: grounded with its heads, or alone for the joint space."""
        config, found = self.config, {}
        if context is None:
            output = self.encode_text_states(tokens, mask, **outputs)
            if config.projection_dim is not None:
                found["text_embeds"] = normalise(self.text_projection(output.pooler_output))
        else:
            output = self.encode_multimodal(tokens, mask, context, **outputs)
            if config.itm:
                found["itm_score"] = self.itm_head(output.pooler_output)
            if config.num_labels is not None:
                found["logits"] = self.classifier(output.pooler_output)
        return found | {"question_embeds": output.last_hidden_state, "text_model_output": output}

    def _compare(self, image: jax.Array, text: jax.Array, return_loss: bool) -> dict[str, Any]:
        config, cosine = self.config, jnp.dot(image, text.T, precision=exact(image))
        scale = jnp.ones(())
        if config.temperature is not None:
            scale = 1 / self.temperature
        if config.logit_scale_init is not None:
            scale = jnp.exp(self.logit_scale)
        found: dict[str, Any] = {"logits_per_image": scale * cosine, "logits_per_text": (scale * cosine).T}
        if config.itm:
            found["itm_score"] = cosine
        return found | ({"loss": contrastive(image, text, scale)} if return_loss else {})

    def _speak(
        self, found: dict[str, Any], text: Any, answers: Any, labels: Any, keep: int, **outputs: Any
    ) -> dict[str, Any]:
        """The decoder's part of `__call__`: captions from image tokens, answers from the states of the question."""
        (tokens, mask), context, context_mask = text, found["last_hidden_state"], None
        if self.config.text is not None and self.config.decoder is not None:
            context, context_mask, (tokens, mask) = found.get("question_embeds"), mask, answers
            if tokens is None and labels is not None:
                tokens = jnp.where(labels < 0, self.config.pad_id, labels)
        if tokens is None or context is None:
            return {}
        output = self.decode_states(tokens, mask, context, context_mask, **outputs)
        logits = self.lm_logits(output.last_hidden_state[:, -keep:])
        return {"logits": logits.reshape(*tokens.shape[:-1], *logits.shape[1:]), "decoder_output": output}

    def _init_parts(self) -> None:
        """Creates the parameters of parts that a forward pass need not use."""
        config, token = self.config, jnp.zeros((1, 1), jnp.int32)
        if config.decoder is not None:
            self.decoder(token, causal=True)
        if config.text is not None:
            hidden = self.text(token).last_hidden_state[:, 0]
            for name in ("text_projection", "itm_head", "classifier"):
                if hasattr(self, name):
                    getattr(self, name)(hidden)
        if config.projection_dim is not None and config.vision is not None:
            self.vision_projection(jnp.zeros((1, config.vision.hidden_size)))
        if config.generative is not None:
            self.lm_logits(jnp.zeros((1, config.generative.hidden_size)))


def _rows(tokens: Any, mask: Any, context: Any, context_mask: Any) -> tuple[Any, Any, Any, Any]:
    """Several texts [B, A, L] for each context as B · A rows, each with its context; [B, L] as it is."""
    if tokens.ndim == 2:
        return tokens, mask, context, context_mask
    count = tokens.shape[1]
    tokens, mask = (None if x is None else x.reshape(-1, x.shape[-1]) for x in (tokens, mask))
    context, context_mask = (None if x is None else jnp.repeat(x, count, axis=0) for x in (context, context_mask))
    return tokens, mask, context, context_mask


def _loss(logits: jax.Array, labels: Any, smoothing: float) -> jax.Array:
    """Cross-entropy of classes [B, K], or of the token after each position [..., L, V]."""
    labels = jnp.asarray(labels)
    if logits.ndim == 2:
        return cross_entropy(logits, labels, label_smoothing=smoothing)
    return cross_entropy(logits[..., :-1, :], labels[..., 1:], label_smoothing=smoothing)
