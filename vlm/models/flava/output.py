"""What FLAVA returns."""

from __future__ import annotations

import flax.struct
import jax

from vlm.encoders.output import EncoderOutput


@flax.struct.dataclass
class FLAVAOutput:
    """Outputs with Hugging Face's names; a field is None where its input, or its part of the model, is absent.

    `…_masked_…` come from the masked inputs, the others from the inputs as they are. Logits are for every position:
    Hugging Face drops rows and positions without a label once labels are given.

    Attributes:
      image_embeddings: [B, 1 + P, E], text_embeddings: [B, L, E], multimodal_embeddings: [B, 1 + (1 + P) + L, E]: the
        last hidden states, normed. With `hidden_states` the last is before the norm, which is what the fusion reads.
      image_output, text_output, multimodal_output: all that the encoders return.
      mim_logits: [B, 1 + P, K] of an image alone, mlm_logits: [B, L, V] of a text alone, mmm_image_logits [B, P, K] and
        mmm_text_logits [B, L, V] of a pair: scores of visual words and of tokens.
      itm_logits: [B, 2], index 1: the pair belongs together.
      contrastive_logits_per_image: [Bi, Bt] and its transpose, exp(logit_scale) · cosine.
    """

    image_embeddings: jax.Array | None = None
    image_output: EncoderOutput | None = None
    text_embeddings: jax.Array | None = None
    text_output: EncoderOutput | None = None
    multimodal_embeddings: jax.Array | None = None
    multimodal_output: EncoderOutput | None = None
    image_masked_embeddings: jax.Array | None = None
    image_masked_output: EncoderOutput | None = None
    text_masked_embeddings: jax.Array | None = None
    text_masked_output: EncoderOutput | None = None
    multimodal_masked_embeddings: jax.Array | None = None
    multimodal_masked_output: EncoderOutput | None = None
    mim_logits: jax.Array | None = None
    mlm_logits: jax.Array | None = None
    itm_logits: jax.Array | None = None
    contrastive_logits_per_image: jax.Array | None = None
    contrastive_logits_per_text: jax.Array | None = None
    mmm_image_logits: jax.Array | None = None
    mmm_text_logits: jax.Array | None = None
