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
    most: int | None = None,
) -> tuple[Int[np.ndarray, " l"], Int[np.ndarray, " l"]]:
    """BERT's masking (Devlin et al. 2019, section 3.1).

    Every real token that is not special is chosen with `probability`; of the chosen, 80 % become `mask_id`, 10 % a
    random token that is not special and 10 % stay.

    Args:
      most: of more chosen tokens than these, so many are drawn; None: no limit.

    Returns:
      the tokens to feed, and labels: the original token where one was chosen, `IGNORE` elsewhere.
    """
    eligible = mask & ~np.isin(tokens, list(special_ids))
    draws = rng.random(tokens.shape)
    chosen = eligible & (draws < probability)
    if most is not None and chosen.sum() > most:
        chosen &= draws <= np.sort(draws[chosen])[most - 1]
    return _hide(tokens, chosen, rng, mask_id, vocab_size, special_ids)


def mask_words(
    tokens: Int[np.ndarray, " l"],
    mask: Bool[np.ndarray, " l"],
    rng: np.random.Generator,
    *,
    probability: float,
    mask_id: int,
    vocab_size: int,
    special_ids: Collection[int],
    continues: Bool[np.ndarray, " v"],
) -> tuple[Int[np.ndarray, " l"], Int[np.ndarray, " l"]]:
    """BERT's masking of whole words.

    Words are taken in random order until `probability` of the real tokens of the row (special ones counted, rounded,
    at least one) are chosen; a word that would exceed that is passed over. Special tokens are never chosen. Every
    chosen token then meets the same fate as in `mask_tokens`.

    Args:
      continues: by token id, whether it goes on with the word of the token before ("##ing").

    Returns:
      the tokens to feed, and labels: the original token where one was chosen, `IGNORE` elsewhere.
    """
    eligible = np.flatnonzero(mask & ~np.isin(tokens, list(special_ids)))
    wanted = max(1, round(int(mask.sum()) * probability))
    chosen, count = np.zeros(tokens.shape, bool), 0
    starts = np.flatnonzero(~continues[tokens[eligible]])
    words = [word for word in np.split(eligible, starts) if len(word)]
    for number in rng.permutation(len(words)):
        if count >= wanted:
            break
        word = words[number]
        if count + len(word) <= wanted:
            chosen[word] = True
            count += len(word)
    return _hide(tokens, chosen, rng, mask_id, vocab_size, special_ids)


def _hide(
    tokens: np.ndarray,
    chosen: np.ndarray,
    rng: np.random.Generator,
    mask_id: int,
    vocab_size: int,
    special_ids: Collection[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Of the chosen tokens, 80 % become `mask_id`, 10 % a random one and 10 % stay."""
    fate = rng.random(tokens.shape)
    # A random padding token would shift RoBERTa's positions: draw among the others by stepping over special ids.
    drawn = rng.integers(0, vocab_size - len(special_ids), tokens.shape)
    for special in sorted(special_ids):
        drawn = drawn + (drawn >= special)
    replaced = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, drawn, tokens))
    fed = np.where(chosen, replaced, tokens).astype(tokens.dtype)
    return fed, np.where(chosen, tokens, IGNORE).astype(np.int32)
