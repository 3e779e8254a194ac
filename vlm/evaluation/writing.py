"""Texts that a model writes for a batch of an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.feed import blank_images, trace
from vlm.generation import GenerationConfig, Prepared, generate, prepare
from vlm.generation.generate import prefill
from vlm.strict import build

PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coco": {"num_beams": 3, "max_length": 20, "min_length": 5, "beam_normalisation": "legacy"},
    "nocaps": {
        "num_beams": 3,
        "max_length": 20,
        "min_length": 5,
        "beam_normalisation": "legacy",
        "repetition_penalty": 1.1,
    },
    "vqa": {"num_beams": 3, "max_length": 10, "min_length": 1, "beam_normalisation": "legacy"},
}
"""How the published numbers were generated (Li et al. 2022, published code); lengths count the prompt."""


def generation_config(
    preset: str, settings: Mapping[str, Any], path: str, *, several: bool = False
) -> GenerationConfig:
    """A preset with some settings replaced.

    A limit on new tokens replaces that on the length, a limit below the preset's least length replaces that too, and
    one beam has no normalisation.

    Args:
      several: allow more than one text per example.

    Raises:
      UserError: an unknown or impossible setting.
    """
    chosen = dict(PRESETS[preset])
    for given, replaced in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if settings.get(given) is not None:
            chosen.pop(replaced, None)
    limit = settings.get("max_length")
    if isinstance(limit, int) and limit < chosen.get("min_length", 0):
        chosen.pop("min_length")
    if settings.get("num_beams", chosen.get("num_beams", 1)) == 1:
        chosen.pop("beam_normalisation", None)
    config = build(GenerationConfig, chosen | dict(settings), path)
    if config.num_return_sequences != 1 and not several:
        raise UserError(f"{path}: expected one text per example, found num_return_sequences")
    return config


@dataclasses.dataclass(frozen=True)
class Writer:
    """A model that writes, its parameters laid out for it."""

    model: Any
    prepared: Prepared
    processor: Any
    config: GenerationConfig

    @classmethod
    def of(cls, embedder: Embedder, config: GenerationConfig) -> Writer:
        """Lays out the parameters.

        Raises:
          UserError: a model that does not generate.
        """
        return cls(embedder.model, prepare(embedder.model, embedder.params), embedder.processor, config)

    def __call__(self, batch: Mapping[str, Any]) -> list[str]:
        """One text per row, without the prompt. `batch`: see `generate`."""
        found = generate(self.model, self.prepared, batch, config=self.config)
        return [self.processor.tokenizer.decode(ids.tolist()).strip() for ids in found.completions]


def prompt_rows(processor: Any, prompt: str, rows: int) -> dict[str, np.ndarray]:
    """`rows` times the beginning of a text; nothing for an empty one."""
    return processor(texts=[prompt] * rows, prompts=True, padding="longest") if prompt.strip() else {}


def question_rows(processor: Any, questions: Sequence[str], rows: np.ndarray, total: int) -> dict[str, np.ndarray]:
    """`total` rows of tokens, question i in row `rows[i]` and any question in the others."""
    texts = [questions[0]] * total
    for row, question in zip(rows, questions, strict=True):
        texts[row] = question
    return processor(texts=texts)


def check_writes(embedder: Embedder, texts: Mapping[str, np.ndarray], *, answers: bool = False) -> None:
    """Traces the model on a blank image and one row of `texts`, without running it.

    Args:
      texts: prompts, or with `answers` questions.

    Raises:
      UserError: it does not write, or its parameters or the processor do not fit.
    """
    model, what = embedder.model, "answer questions" if answers else "write captions"
    prepared = trace(what, lambda params: prepare(model, params), embedder.params)  # names a model that does not write
    if getattr(embedder.processor, "tokenizer", None) is None:
        raise UserError(f"this model and processor cannot {what}: the checkpoint has no tokenizer")
    batch = {"image": np.asarray(embedder.processor(images=blank_images())["image"])}
    arrays = model.prompt(batch | {name: array[:1] for name, array in texts.items()})
    if answers != ("question" in arrays):
        kinds = ("goes on from the text it is given", "answers questions")
        raise UserError(f"expected a model that {kinds[answers]}, found one that {kinds[not answers]}")
    shapes = {name: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype) for name, x in arrays.items()}
    trace(what, lambda params, batch: prefill(model.clone(decoding=True), params, batch), prepared.params, shapes)
