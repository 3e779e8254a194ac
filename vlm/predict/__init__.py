"""Uses a model from the command line.

    python -m vlm.predict CHECKPOINT --task=classify --image=a.jpg --text=cat --text=狗 --template='a photo of {c}'
    python -m vlm.predict CHECKPOINT --task=retrieve --image=photos/ --text='una playa al atardecer'
    python -m vlm.predict CHECKPOINT --task=embed --image=photos/ --text=@captions.txt --output=embeddings.npy
    python -m vlm.predict CHECKPOINT --task=caption --image=photos/ --num_beams=3
    python -m vlm.predict CHECKPOINT --task=answer --image=a.jpg --text='how many dogs are there?'
    python -m vlm.predict CHECKPOINT --task=match --image=photos/ --text='a dog on a beach'
    python -m vlm.predict CHECKPOINT --task=localise --image=a.jpg --text='a dog on a beach' --output=where.png

--image takes files and folders and may be repeated; --text takes texts in any language, or @FILE with one per line:
labels, queries, captions, questions; for captions how they begin (--text= is nothing; without --text it is what the
model was trained with). Every text is put to every image. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import Parser, UserError, exit_on_user_error
from vlm.heap import keep_freed_memory

CONTRASTIVE, WRITING, GROUNDED = ("classify", "retrieve", "embed"), ("caption", "answer"), ("match", "localise")
TASKS = (*CONTRASTIVE, *WRITING, *GROUNDED)
RANKING, TOP = ("classify", "retrieve"), 5
OUTPUTS = {"embed": ".npy", "localise": ".png"}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MAX_TEXT_BYTES = 64 << 20
GENERATION: dict[str, Any] = {
    "max_new_tokens": int, "max_length": int, "min_new_tokens": int, "min_length": int, "num_beams": int,
    "num_return_sequences": int, "do_sample": bool, "temperature": float, "top_k": int, "top_p": float,
    "repetition_penalty": float, "no_repeat_ngram_size": int, "length_penalty": float, "seed": int,
}  # fmt: skip


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
    parser.add_argument("--top", type=int, metavar="K", help="classify, retrieve: answers shown per query (default 5)")
    parser.add_argument(
        "--output", metavar="FILE", help="embed: .npy, rows as in the JSON; localise: .png; others: .json"
    )
    parser.add_argument("--batch_size", type=int, default=16, metavar="N")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and computation; default: as stored"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="localise: whose attention, from 0 (default 7 of 12)")
    generation = parser.add_argument_group("caption and answer", "as vlm.generation.GenerationConfig has them")
    for name, kind in GENERATION.items():
        how: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": kind}
        generation.add_argument(f"--{name}", **how)
    generation.add_argument("--beam_normalisation", choices=("hf", "legacy"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with exit_on_user_error():
        options = arguments().parse_args(argv)
        images, texts = find_images(options.image), read_texts(options.text, options.task == "caption")
        _check(options, images, texts)
        keep_freed_memory()
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


def read_texts(values: Sequence[str], empty: bool = False) -> list[str]:
    """The texts that `--text` gives, in order.

    Raises:
      UserError: a file that is missing, too large or not UTF-8; an empty text, unless `empty` allows it.
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
    if not empty and any(not text.strip() for text in texts):
        raise UserError("--text: expected a text, found an empty one")
    return texts


def _check(options: argparse.Namespace, images: list[Path], texts: list[str]) -> None:
    if not Path(options.checkpoint).exists():
        raise UserError(f"no such checkpoint: {options.checkpoint}")
    if options.top is not None and options.task not in RANKING:
        raise UserError(f"--top belongs to --task=classify and retrieve, found --task={options.task}")
    if options.top is None:
        options.top = TOP
    if options.top < 1 or options.batch_size < 1:
        raise UserError("--top and --batch_size: expected at least 1")
    if options.task == "embed":
        if not (images or texts):
            raise UserError("--task=embed needs --image or --text")
    elif not images or not (texts or options.task == "caption"):
        needed = "--image" if options.task == "caption" else "--image and --text"
        raise UserError(f"--task={options.task} needs {needed}")
    if options.task == "caption" and len(texts) > 1:
        raise UserError(f"--task=caption takes one --text, how captions begin, found {len(texts)}")
    if options.task == "localise" and not (len(images) == len(texts) == 1 and options.output):
        raise UserError("--task=localise needs one --image, one --text and --output=FILE.png")
    given = generation_flags(options)
    if given and options.task not in WRITING:
        raise UserError(f"--{next(iter(given))} belongs to --task=caption and answer, found --task={options.task}")
    if options.layer is not None and options.task != "localise":
        raise UserError(f"--layer belongs to --task=localise, found --task={options.task}")
    if options.task == "classify" and len(texts) < 2:
        raise UserError(f"--task=classify needs at least two labels, found --text={texts[0]}")
    if options.template and options.task != "classify":
        raise UserError(f"--template belongs to --task=classify, found --task={options.task}")
    suffix = OUTPUTS.get(options.task, ".json")
    if options.output:
        output = Path(options.output)
        if output.suffix != suffix:
            raise UserError(f"--output: expected a name that ends in {suffix} for this task, found {output}")
        if not output.parent.is_dir() or output.is_dir() or not os.access(output.parent, os.W_OK):
            raise UserError(f"--output: cannot write {output}")


def generation_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that were given."""
    found = {name: getattr(options, name) for name in (*GENERATION, "beam_normalisation")}
    return {name: value for name, value in found.items() if value is not None and value is not False}


def _predict(options: argparse.Namespace, images: list[Path], texts: list[str]) -> dict[str, Any]:
    from vlm.data.image import decode
    from vlm.evaluation import prompts
    from vlm.family import NO_PROCESSOR
    from vlm.loading import load
    from vlm.predict import contrastive, grounded, writing
    from vlm.predict.output import write

    prompts.load_templates(options.template or ["{c}"])
    settings = writing.settings(options.task, generation_flags(options)) if options.task in WRITING else None
    if images:
        decode(images[0])  # a wrong path or format shows before a large model is loaded
    loaded = load(options.checkpoint, dtype=options.dtype)
    if loaded[2] is None:
        raise UserError(f"{options.checkpoint} {NO_PROCESSOR}")
    if settings is not None:
        answer = writing.run(options, images, texts, loaded, settings)
    else:
        answer = (contrastive if options.task in CONTRASTIVE else grounded).run(options, images, texts, loaded)
    if options.output and options.task not in OUTPUTS:
        content = json.dumps(answer, indent=2, ensure_ascii=False) + "\n"
        write(Path(options.output), content.encode(errors="backslashreplace"))
    return answer
