"""What a BLIP model returns."""

from __future__ import annotations

import flax.struct
import jax

from vlm.encoders.output import EncoderOutput


@flax.struct.dataclass
class BLIPOutput:
    """Outputs with Hugging Face's names; a field is None where the model or the call has nothing for it.

    Attributes:
      loss: float[]: language modelling with `labels` [B, L], classification with `labels` [B], contrastive with
        `return_loss`.
      logits: [B, L, V] of the decoder ([B, A, L, V] for several answers), or [B, num_labels].
      itm_score: [B, 2] matching logits (index 1: matched), or the cosines [Bi, Bt] with `use_itm_head=False`.
      logits_per_image, logits_per_text: scaled cosines [Bi, Bt] and their transpose.
      image_embeds: unit vectors [B, projection_dim]; the image tokens [B, 1 + P, Dv] of a model without projections.
      text_embeds: unit vectors [B, projection_dim].
      question_embeds: [B, L, E], the last states of the text encoder.
      last_hidden_state: the image tokens; hidden_states, attentions: of the image encoder, on request.
      vision_pooler_output: [B, Dv], the image's class token.
      text_model_output, vision_model_output, decoder_output: everything that each stack gives.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    itm_score: jax.Array | None = None
    logits_per_image: jax.Array | None = None
    logits_per_text: jax.Array | None = None
    image_embeds: jax.Array | None = None
    text_embeds: jax.Array | None = None
    question_embeds: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None
    vision_pooler_output: jax.Array | None = None
    text_model_output: EncoderOutput | None = None
    vision_model_output: EncoderOutput | None = None
    decoder_output: EncoderOutput | None = None
