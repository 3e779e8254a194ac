"""How well texts fit images, and where in an image a text is found."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.image import decode
from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.feed import blank_images, trace
from vlm.evaluation.heads import has_head
from vlm.evaluation.heatmap import sheet
from vlm.evaluation.statements import judge
from vlm.predict.output import rounded, write


def run(options: Any, images: Sequence[Path], texts: Sequence[str], loaded: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Matches or localises; returns the answer as JSON can hold it."""
    if options.task == "match":
        return match(images, texts, loaded, options.batch_size)
    return localise(images[0], texts[0], loaded, options.layer, options.output)


def match(
    images: Sequence[Path], texts: Sequence[str], loaded: tuple[Any, Any, Any], batch_size: int
) -> dict[str, Any]:
    """Probability of the matching head and cosine in the joint space, whichever the model has, for every pair.

    Raises:
      UserError: it has neither, or does not read what the processor makes.
    """
    model, params, processor = loaded
    config = getattr(model, "config", None)
    judges = has_head(model, "match") and getattr(config, "num_images", 1) == 1
    if not judges and getattr(config, "projection_dim", None) is None:
        raise UserError(f"{type(model).__name__}: this model has neither a matching head nor a joint space")
    cosines = probabilities = None
    if getattr(config, "projection_dim", None) is not None:
        embedder = Embedder(model, params, processor, batch_size=batch_size)
        embedder.check()
        cosines = embedder.pictures(images) @ embedder.texts(texts).T
    if judges:
        probabilities = _probabilities(images, texts, loaded, batch_size)
    results = []
    for i, path in enumerate(images):
        print(path)
        for t, text in enumerate(texts):
            row: dict[str, Any] = {"image": str(path), "text": text}
            if probabilities is not None:
                row["probability"] = rounded(probabilities[i, t])
            if cosines is not None:
                row["cosine"] = rounded(cosines[i, t])
            print("  " + "  ".join(f"{row[name]:.4f}" for name in ("probability", "cosine") if name in row), text)
            results.append(row)
    return {"task": "match", "results": results}


def localise(image: Path, text: str, loaded: tuple[Any, Any, Any], layer: int | None, output: str) -> dict[str, Any]:
    """Draws where the text, and each of its words, is found in the image.

    Raises:
      UserError: a model without matching head or that does not read what the processor makes, or no such layer.
    """
    from vlm.models.blip.config import BLIPConfig
    from vlm.models.blip.localise import localise as find

    model, params, processor = loaded
    if not isinstance(getattr(model, "config", None), BLIPConfig):
        raise UserError(f"--task=localise: expected a BLIP with a matching head, found {type(model).__name__}")
    picture = decode(image)
    batch = processor(images=[picture], texts=[text], prompts=False)
    trace("localise", lambda p, x: model.apply({"params": p}, x, method="encode_image_states"), params, batch["image"])
    found = find(model, params, batch["image"], batch["tokens"], batch["mask"], layer)
    ids = batch["tokens"][0][batch["mask"][0]].tolist()
    words = [processor.tokenizer.decode([token], skip_special=False) for token in ids[1:-1]]
    maps = np.asarray(found.tokens[0])
    panels = [("[ENC]", maps[0]), (text, np.asarray(found.average[0]))]
    panels += [(word, maps[place]) for place, word in enumerate(words, 1)]
    buffer = io.BytesIO()
    sheet(picture, panels).save(buffer, "PNG")
    write(Path(output), buffer.getvalue())
    logits = np.asarray(found.logits[0], np.float64)
    probability = rounded(1 / (1 + np.exp(logits[0] - logits[1])))
    peaks = []
    for word, values in panels:
        row, column = np.unravel_index(int(values.argmax()), values.shape)
        place = {"x": rounded((column + 0.5) / values.shape[1]), "y": rounded((row + 0.5) / values.shape[0])}
        peaks.append({"text": word, "peak": place})
    print(f"{image}  {text}  {probability:.4f}\n{output}")
    answer = {"image": str(image), "text": text, "probability": probability, "maps": peaks, "output": output}
    return {"task": "localise", **answer}


def _probabilities(
    images: Sequence[Path], texts: Sequence[str], loaded: tuple[Any, Any, Any], batch_size: int
) -> np.ndarray:
    """Of every pair, [images, texts]."""
    model, params, processor = loaded
    batch = processor(texts=list(texts), **_as_texts(processor))
    first = processor(images=blank_images())["image"], batch["tokens"][None, :1], batch["mask"][None, :1]
    trace("match images and texts", functools.partial(judge, model, "match"), params, *first)
    found = np.zeros((len(images), len(texts)))
    for i, path in enumerate(images):
        image = processor(images=[decode(path)])["image"]
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            tokens, mask = batch["tokens"][None, part], batch["mask"][None, part]
            found[i, part] = np.asarray(judge(model, "match", params, image, tokens, mask))[0]
    return found


def _as_texts(processor: Any) -> dict[str, Any]:
    """A captioner's processor takes texts for beginnings unless told otherwise."""
    config = getattr(processor, "config", None)
    return {"prompts": False} if dataclasses.is_dataclass(config) and hasattr(config, "prompt") else {}
