"""The model that pretraining starts from: an image encoder of one model, the text stack of another, the rest random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm.convert.layouts import Imported
from vlm.convert.views import TensorView, from_array
from vlm.errors import UserError
from vlm.models.blip.config import VIT, BLIPConfig
from vlm.models.blip.transfer import initial
from vlm.tree import listing

_NEW = 2  # [DEC] and [ENC]
_BY_ROWS = ("text/token_embedding/embedding", "lm_head/bias")

Shapes = Callable[[BLIPConfig], Mapping[str, Any]]


def assemble(text: Imported, vision: Imported, *, shapes: Shapes, seed: int = 0) -> Imported:
    """Builds a BLIP to be pretrained, as the authors do from DeiT and BERT.

    Both self-attentions of the text stack start as BERT's; [DEC] and [ENC] are appended to a vocabulary that lacks
    them. What neither source has (cross-attention, projections, matching head, two token vectors) is initialised from
    `seed`: kernels N(0, 0.02), biases zero, norms one, temperature 0.07.

    Raises:
        UserError: one of them lacks the tower, or their shapes do not fit.
    """
    stack, tower = text.config.text or text.config.decoder, vision.config.vision
    if stack is None or tower is None:
        lacks = f"{text.layout} has no text stack" if stack is None else f"{vision.layout} has no image encoder"
        raise UserError(f"to build BLIP: {lacks}")
    tower = dataclasses.replace(tower, norm_eps=VIT.norm_eps, output_norm=VIT.output_norm)
    words = stack.vocab_size if stack.vocab_size <= text.config.enc_id else text.config.bos_id
    vocab = max(stack.vocab_size, words + _NEW)
    stack = dataclasses.replace(stack, vocab_size=vocab, context_size=tower.hidden_size, pooler=False)
    ids = {name: getattr(text.config, name) for name in ("sep_id", "cls_id", "pad_id")}
    config = BLIPConfig(tower, stack, bos_id=words, enc_id=words + 1, **ids)
    given = {path: view for path, view in vision.params.items() if path.startswith("vision/")} | _stack(text)
    rng, notes, params, new = np.random.default_rng(seed), [*text.notes, *vision.notes], {}, []
    for path, leaf in shapes(config).items():
        view = given.get(path)
        if view is not None and path in _BY_ROWS and view.shape[0] < leaf.shape[0]:
            added = initial(path, (leaf.shape[0] - view.shape[0], *leaf.shape[1:]), rng)
            view = from_array(np.concatenate([view.read().astype(np.float32), added]))
        if view is None:
            new.append(path)
            view = from_array(initial(path, leaf.shape, rng))
        if view.shape != tuple(leaf.shape):
            raise UserError(f"to build BLIP: {path} has shape {list(view.shape)}, not {list(leaf.shape)}")
        params[path] = view
    notes.append(f"initialised from seed {seed}, in no source: {listing(new)}")
    return Imported(config, params, f"{text.layout} + {vision.layout}", notes)


def _stack(text: Imported) -> dict[str, TensorView]:
    """The text stack's parameters under the paths of a shared one; its self-attention serves as the decoder's too."""
    own = "text/" if text.config.text is not None else "decoder/"
    found = {path: view for path, view in text.params.items() if path.startswith("lm_head/")}
    for path, view in text.params.items():
        if path.startswith(own):
            path = f"text/{path.removeprefix(own)}"
            found[path] = view
            if path.startswith(("text/layers/attention/", "text/layers/attention_norm/")):
                found.setdefault(path.replace("/attention", "/decoder_attention", 1), view)
    return found
