"""What an encoder returns."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class EncoderOutput:
    """Fields carry Hugging Face's names.

    Attributes:
      last_hidden_state: [B, L, E], or [B, K, E] where only the states at K positions were asked for.
      pooler_output: [B, E], one vector per example, where the encoder has such an output.
      hidden_states: [layers + 1, B, L, E] on request; index 0 is the input of the first layer.
      attentions: [layers, B, H, L, L] on request; float32.
      cross_attentions: [layers, B, H, L, M] on request, where another sequence was read; float32.
      pre_norm_state: like last_hidden_state, before the final norm, of an encoder that norms all tokens.
    """

    last_hidden_state: jax.Array
    pooler_output: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    pre_norm_state: Any = None
