"""Uses a contrastive model from the command line: classify, retrieve, embed.

    python -m vlm.predict CHECKPOINT --task=classify --image=a.jpg --text=cat --text=狗 --template='a photo of {c}'
    python -m vlm.predict CHECKPOINT --task=classify --image=photos/ --text=@labels.txt
    python -m vlm.predict CHECKPOINT --task=retrieve --image=photos/ --text='una playa al atardecer'
    python -m vlm.predict CHECKPOINT --task=embed --image=photos/ --text=@captions.txt --output=embeddings.npy

--image takes files and folders and may be repeated; --text takes texts in any language, or @FILE with one per line. The
last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import Parser, UserError, exit_on_user_error

TASKS = ("classify", "retrieve", "embed")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_TEXT_BYTES = 64 << 20


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m vlm.predict", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="model folder, training workdir, HF folder, .pt file")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture or a folder of them")
    parser.add_argument(
        "--text", action="append", default=[], metavar="TEXT", help="a text, or @FILE with one per line"
    )
    parser.add_argument(
        "--template", action="append", default=[], metavar="TEXT", help="classify: prompt with {c}; repeat to average"
    )
    parser.add_argument("--top", type=int, default=5, metavar="K", help="answers shown per query (default 5)")
    parser.add_argument("--output", metavar="FILE", help="embed: .npy, rows as in the JSON; others: .json")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and computation; default: as stored"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with exit_on_user_error():
        options = arguments().parse_args(argv)
        images, texts = find_images(options.image), read_texts(options.text)
        _check(options, images, texts)
        answer = _predict(options, images, texts)
    print(json.dumps(answer, ensure_ascii=False))
    return 0


def find_images(paths: Sequence[str]) -> list[Path]:
    """The picture files that `--image` names; of folders all pictures in them, by name.

    Raises:
      UserError: a path that does not exist, a folder without pictures.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise UserError(f"--image: no picture in {path} ({', '.join(sorted(SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--image: no such file or folder: {path}")
    return found


def read_texts(values: Sequence[str]) -> list[str]:
    """The texts that `--text` gives, in order.

    Raises:
      UserError: a file that is missing, too large or not UTF-8; an empty text.
    """
    texts: list[str] = []
    for value in values:
        if not value.startswith("@"):
            texts.append(value)
            continue
        path = Path(value[1:])
        if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:
            raise UserError(f"--text: no such text file (of at most {MAX_TEXT_BYTES >> 20} MiB): {path}")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--text: {path} is not UTF-8 text") from None
        texts += [line.strip() for line in lines if line.strip()]
    if any(not text.strip() for text in texts):
        raise UserError("--text: expected a text, found an empty one")
    return texts


def _check(options: argparse.Namespace, images: list[Path], texts: list[str]) -> None:
    if not Path(options.checkpoint).exists():
        raise UserError(f"no such checkpoint: {options.checkpoint}")
    if options.top < 1 or options.batch_size < 1:
        raise UserError("--top and --batch_size: expected at least 1")
    if options.task != "embed" and not (images and texts):
        raise UserError(f"--task={options.task} needs --image and --text")
    if options.task == "embed" and not (images or texts):
        raise UserError("--task=embed needs --image or --text")
    if options.task == "classify" and len(texts) < 2:
        raise UserError(f"--task=classify needs at least two labels, found --text={texts[0]}")
    if options.template and options.task != "classify":
        raise UserError(f"--template belongs to --task=classify, found --task={options.task}")
    suffix = ".npy" if options.task == "embed" else ".json"
    if options.output:
        output = Path(options.output)
        if output.suffix != suffix:
            raise UserError(f"--output: expected a name that ends in {suffix} for this task, found {output}")
        if not output.parent.is_dir() or output.is_dir() or not os.access(output.parent, os.W_OK):
            raise UserError(f"--output: cannot write {output}")


def _predict(options: argparse.Namespace, images: list[Path], texts: list[str]) -> dict[str, Any]:
    from vlm.data.image import decode
    from vlm.evaluation import prompts
    from vlm.evaluation.embed import Embedder
    from vlm.evaluation.zero_shot import class_embeddings
    from vlm.loading import load

    templates = prompts.load_templates(options.template or ["{c}"])
    if images:
        decode(images[0])  # a wrong path or format shows before a large model is loaded
    model, params, processor = load(options.checkpoint, dtype=options.dtype)
    if processor is None:
        raise UserError(f"{options.checkpoint} has no tokenizer and image settings")
    embedder = Embedder(model, params, processor, batch_size=options.batch_size)
    embedder.check(images=bool(images), texts=bool(texts))
    names, image_embeds = [str(path) for path in images], embedder.pictures(images)
    if options.task == "classify":
        classes = class_embeddings(embedder, texts, templates)
        scale = float(np.exp(np.asarray(params["logit_scale"], np.float32))) if "logit_scale" in params else 100.0
        answer = classify(names, image_embeds, texts, classes, scale, options.top)
    elif options.task == "retrieve":
        answer = retrieve(names, image_embeds, texts, embedder.texts(texts), options.top)
    else:
        parts = [image_embeds] if images else []
        return embed(
            names, texts, np.concatenate([*parts, *([embedder.texts(texts)] if texts else [])]), options.output
        )
    if options.output:
        _write(Path(options.output), json.dumps(answer, indent=2, ensure_ascii=False).encode() + b"\n")
    return answer


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
            {"label": labels[i], "probability": _round(probabilities[i]), "cosine": _round(cosines[i])} for i in best
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
            row["embedding"] = [_round(value) for value in vector]
    else:
        import io

        buffer = io.BytesIO()
        np.save(buffer, embeds)
        _write(Path(output), buffer.getvalue())
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
        found = [{item_key: items[index], "cosine": _round(row[index])} for index in best]
        results.append({query_key: query, found_key: found})
    return results


def _round(value: Any) -> float:
    return round(float(value), 6)


def _write(path: Path, content: bytes) -> None:
    from vlm.manifest import write_atomically

    write_atomically(path, content)


if __name__ == "__main__":
    sys.exit(main())
