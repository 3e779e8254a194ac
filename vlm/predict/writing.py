"""What a model writes about images: captions, answers to questions."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.data.image import decode
from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.writing import check_writes, generation_config, prompt_rows
from vlm.generation import GenerationConfig, generate, prepare
from vlm.predict.output import as_flags, rounded


def settings(task: str, given: Mapping[str, Any]) -> GenerationConfig:
    """How the task's published results were generated, with what is given in its place; samples without beams.

    Raises:
      UserError: settings that contradict each other, named as the flags that they were given with.
    """
    preset = {"caption": "coco", "answer": "vqa"}[task]
    if given.get("do_sample"):
        given = {"num_beams": 1, **given}
    try:
        return generation_config(preset, given, "generation", several=True)
    except UserError as error:
        names = (field.name for field in dataclasses.fields(GenerationConfig))
        raise UserError(as_flags(str(error), "generation", names)) from None


def run(
    options: Any, images: Sequence[Path], texts: Sequence[str], loaded: tuple[Any, Any, Any], config: GenerationConfig
) -> dict[str, Any]:
    """Prints and returns what the model writes about each image, best first."""
    model, params, processor = loaded
    if options.task == "caption" and getattr(model, "pretrained_only", False):
        print("note: this is a pretraining model; one fine-tuned for captions writes better", file=sys.stderr)
    prompt = texts[0] if texts else getattr(getattr(processor, "config", None), "prompt", "")
    asks = options.task == "answer"
    _check_lengths(texts, model, processor, asks)
    rows = processor(texts=list(texts[:1])) if asks else prompt_rows(processor, prompt, 1)
    check_writes(Embedder(model, params, processor), rows, answers=asks)
    prepared = prepare(model, params)
    pairs = [(path, text) for path in images for text in (texts if asks else [prompt])]
    results = []
    for start in range(0, len(pairs), options.batch_size):
        part = pairs[start : start + options.batch_size]
        batch = processor(images=[decode(path) for path, _ in part])
        asked = [text for _, text in part]
        batch |= processor(texts=asked) if asks else prompt_rows(processor, prompt, len(part))
        found = generate(model, prepared, batch, config=config)
        said = [processor.tokenizer.decode(ids.tolist()).strip() for ids in found.completions]
        count = config.num_return_sequences
        for number, (path, text) in enumerate(part):
            mine = slice(number * count, (number + 1) * count)
            row = {"image": str(path)} | ({"question": text} if asks else {"prompt": text})
            scores = [rounded(score) for score in found.scores[mine]]
            row |= {options.task: said[mine][0], "score": scores[0]}
            if count > 1:
                row["all"] = [{"text": t, "score": s} for t, s in zip(said[mine], scores, strict=True)]
            results.append(row)
            print(path, f"\n  {text}" if asks else "", *(f"\n  {t}" for t in said[mine]), sep="")
    return {"task": options.task, "results": results}


def _check_lengths(texts: Sequence[str], model: Any, processor: Any, asks: bool) -> None:
    """Evaluations cut questions, as published; here that would answer, or go on from, another text."""
    if getattr(processor, "tokenizer", None) is None:
        return
    bound = getattr(processor, "max_length", None) if asks else getattr(model, "context_length", None)
    longest = bound or math.inf
    for text in texts:
        count = len(processor.tokenizer.encode(text)) + (2 if asks else 1)  # [CLS], of questions [SEP] too
        if count > longest:
            raise UserError(f"--text: the model reads at most {longest} tokens, found {count}: {text[:40]}…")
