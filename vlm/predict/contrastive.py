"""What a contrastive model says: classes, neighbours, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.evaluation import prompts
from vlm.evaluation.embed import Embedder
from vlm.evaluation.zero_shot import class_embeddings
from vlm.predict.output import rounded, write


def run(options: Any, images: Sequence[Path], texts: Sequence[str], loaded: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Classifies, retrieves or embeds; returns the answer as JSON can hold it.

    Raises:
      UserError: a model without joint space, or that does not read what the processor makes.
    """
    templates = prompts.load_templates(options.template or ["{c}"])
    model, params, processor = loaded
    if getattr(getattr(model, "config", None), "projection_dim", "unknown") is None:
        lacks = "this model has no joint space of images and texts (projection_dim)"
        raise UserError(f"--task={options.task}: {type(model).__name__}: {lacks}; a pretrained or retrieval model has")
    embedder = Embedder(model, params, processor, batch_size=options.batch_size)
    embedder.check(images=bool(images), texts=bool(texts))
    names, image_embeds = [str(path) for path in images], embedder.pictures(images)
    if options.task == "classify":
        classes = class_embeddings(embedder, texts, templates)
        return classify(names, image_embeds, texts, classes, scale(params), options.top)
    if options.task == "retrieve":
        return retrieve(names, image_embeds, texts, embedder.texts(texts), options.top)
    parts = [image_embeds] if images else []
    return embed(names, texts, np.concatenate([*parts, *([embedder.texts(texts)] if texts else [])]), options.output)


def scale(params: Any) -> float:
    """What cosines are multiplied by: exp(logit_scale), or 1 / temperature; 100 where a model has neither."""
    if "logit_scale" in params:
        return float(np.exp(np.asarray(params["logit_scale"], np.float32)))
    return 1 / float(np.asarray(params["temperature"], np.float32)) if "temperature" in params else 100.0


def classify(
    names: Sequence[str], images: np.ndarray, labels: Sequence[str], classes: np.ndarray, scale: float, top: int
) -> dict[str, Any]:
    """Prints the most likely labels of each image; probabilities are softmax(scale · cosine) over all labels."""
    results = []
    for name, cosines in zip(names, images @ classes.T, strict=True):
        logits = scale * (cosines - cosines.max()).astype(np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-cosines, kind="stable")[:top]
        print(name)
        for index in best:
            print(f"  {probabilities[index]:7.2%}  {labels[index]}")
        found = [
            {"label": labels[i], "probability": rounded(probabilities[i]), "cosine": rounded(cosines[i])} for i in best
        ]
        results.append({"image": name, "prediction": labels[best[0]], "labels": found})
    return {"task": "classify", "results": results}


def retrieve(
    names: Sequence[str], images: np.ndarray, texts: Sequence[str], text_embeds: np.ndarray, top: int
) -> dict[str, Any]:
    """Prints the images nearest to each text and the texts nearest to each image."""
    cosines = images @ text_embeds.T
    by_text = _nearest(texts, names, cosines.T, top, ("text", "images", "image"))
    by_image = _nearest(names, texts, cosines, top, ("image", "texts", "text"))
    return {"task": "retrieve", "text_to_image": by_text, "image_to_text": by_image}


def embed(names: Sequence[str], texts: Sequence[str], embeds: np.ndarray, output: str | None) -> dict[str, Any]:
    """Writes or returns unit embeddings, images first, then texts."""
    rows: list[dict[str, Any]] = [{"image": name} for name in names] + [{"text": text} for text in texts]
    if output is None:
        for row, vector in zip(rows, embeds, strict=True):
            row["embedding"] = [rounded(value) for value in vector]
    else:
        import io

        buffer = io.BytesIO()
        np.save(buffer, embeds)
        write(Path(output), buffer.getvalue())
    print(f"{len(rows)} embeddings of width {embeds.shape[1]}" + (f" in {output}" if output else ""))
    return {"task": "embed", "width": int(embeds.shape[1]), "output": output, "rows": rows}


def _nearest(
    queries: Sequence[str], items: Sequence[str], cosines: np.ndarray, top: int, keys: tuple[str, str, str]
) -> list[dict[str, Any]]:
    query_key, found_key, item_key = keys
    results = []
    for query, row in zip(queries, cosines, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        print(query)
        for rank, index in enumerate(best, 1):
            print(f"  {rank}. {row[index]:+.3f}  {items[index]}")
        found = [{item_key: items[index], "cosine": rounded(row[index])} for index in best]
        results.append({query_key: query, found_key: found})
    return results
