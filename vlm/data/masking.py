"""Masked language modelling: which tokens are hidden, and what the model has to predict."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Int

IGNORE = -100
"""Label of positions that are not predicted."""


def mask_tokens(
    tokens: Int[np.ndarray, " l"],
    mask: Bool[np.ndarray, " l"],
    rng: np.random.Generator,
    *,
    probability: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Collection[int],
) -> tuple[Int[np.ndarray, " l"], Int[np.ndarray, " l"]]:
    """BERT's masking (Devlin et al. 2019, section 3.1).

    Every real token that is not special is chosen with `probability`; of the chosen, 80 % become `mask_id`, 10 % a
    random token that is not special and 10 % stay.

    Returns:
      the tokens to feed, and labels: the original token where one was chosen, `IGNORE` elsewhere.
    """
    eligible = mask & ~np.isin(tokens, list(special_ids))
    chosen = eligible & (rng.random(tokens.shape) < probability)
    fate = rng.random(tokens.shape)
    # A random padding token would shift RoBERTa's positions: draw among the others by stepping over special ids.
    drawn = rng.integers(0, vocab_size - len(special_ids), tokens.shape)
    for special in sorted(special_ids):
        drawn = drawn + (drawn >= special)
    replaced = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, drawn, tokens))
    fed = np.where(chosen, replaced, tokens).astype(tokens.dtype)
    return fed, np.where(chosen, tokens, IGNORE).astype(np.int32)
