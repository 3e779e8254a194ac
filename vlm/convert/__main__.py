"""Converts checkpoints: `python -m vlm.convert SOURCE TARGET [--to=vlm|hf|original] [--task=...] [--dtype=bfloat16]`.

SOURCE is a model folder, a training workdir, a Hugging Face folder or an original .pth/.pt/.pkl file; what it is
follows from its files. TARGET is a new folder; with --to=original, of a .pth file with its authors' names. Memory
stays near the largest tensor, whatever the model's size; a training workdir to hf or original needs the model's size
on disk once more while it runs.

    python -m vlm.convert BAAI/AltCLIP altclip                     # published weights to ours
    python -m vlm.convert altclip altclip_hf --to=hf               # and back, for transformers
    python -m vlm.convert CLIP_FOLDER new --text=XLMR_FOLDER       # a new AltCLIP from CLIP and XLM-R, to be trained
    python -m vlm.convert DEIT start --text=BERT_FOLDER            # a new BLIP, to be pretrained
    python -m vlm.convert model_base_vqa.pth vqa --tokenizer=bert-base-uncased      # the authors' files have none
    python -m vlm.convert model_base.pth start --task=vqa --image-size=480          # a pretrained BLIP for a task
    python -m vlm.convert model_base.pth start --task=nlvr --random                 # and what it lacks at random
    python -m vlm.convert flava_full flava_text --to=hf --drop='(?!text/).*'        # one encoder of a FLAVA
    python -m vlm.convert encoder.pkl codebook                     # DALL-E's encoder, which names visual words

Tasks of BLIP: caption, retrieval, vqa, nlvr, classification (--labels=N).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vlm.convert.torch_file import open_tensors
from vlm.convert.torch_writer import write_pth
from vlm.convert.views import TensorView, cast
from vlm.convert.writer import check_new_folder, new_folder, write_safetensors, write_tensors
from vlm.errors import Parser, UserError, exit_on_user_error
from vlm.manifest import write_atomically
from vlm.tree import listing

_EXTRA = "extra/"
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a wrong input ends with one line and exit status 2."""
    with exit_on_user_error():
        convert(_parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m vlm.convert", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", choices=("vlm", "hf", "original"), default="vlm", help="what to write (default: vlm)")
    parser.add_argument("--dtype", choices=DTYPES, help="element type to write (default: as stored)")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="take the text encoder from this model instead")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="the tokenizer's files, if not beside the weights"
    )
    parser.add_argument("--task", help="the model that this task starts from, e.g. caption from a pretrained BLIP")
    parser.add_argument("--labels", type=int, metavar="N", help="classes, for --task=classification")
    parser.add_argument("--random", action="store_true", help="initialise what --task finds in no source")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize the position table for such images")
    parser.add_argument("--seed", type=int, help="for weights that --text or --random initialise (default 0)")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change an architecture value, e.g. vision.activation=gelu or text.num_heads=12",
    )
    parser.add_argument("--drop", metavar="REGEX", help="leave out parameters whose path matches (--to=hf, original)")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    """Converts as the parsed options say, printing notes and a summary.

    Raises:
        UserError: see `vlm.load`; the target exists; nothing in transformers holds such a model.
    """
    from vlm.loading import load_processor, save_views

    _check(options)
    started = time.perf_counter()
    check_new_folder(options.target)
    opened = _open(options)
    views, extra = (_typed(part, options.dtype) for part in (opened.params, opened.extra))
    opened, dropped = _without(options.drop, dataclasses.replace(opened, params=views, extra=extra))
    for note in opened.notes:
        print(f"note: {note}")
    processor = load_processor(opened, options.task)
    if processor is None:
        print("note: no tokenizer beside the weights (--tokenizer=FOLDER), so the result has none")
    views, extra = opened.params, opened.extra
    count = sum(math.prod(view.shape) for view in views.values())
    total = sum(view.nbytes for view in (*views.values(), *(extra.values() if options.to != "hf" else ())))
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        if options.to == "vlm":
            save_views(options.target, opened.family, opened.config, views, processor, bar.update, extra)
        else:
            notes = [f"left out {', '.join(dropped)}"] if dropped else []
            _write_foreign(options, opened, processor, bar, notes)
    seconds = time.perf_counter() - started
    print(
        f"{options.target}: {opened.origin} -> {options.to}, {count:,} parameters, {total:,} bytes in {seconds:.1f} s"
    )


def _check(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    for name, given in (("random", options.random), ("labels", options.labels is not None)):
        if given and options.task is None:
            raise UserError(f"--{name} has no effect without --task")
    for name, least in (("labels", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and not least <= value < 2**32:
            raise UserError(f"--{name}: expected a number of at least {least}, found {value}")
    if options.labels is not None and options.task != "classification":
        raise UserError(f"--labels has no effect with --task={options.task}")
    if options.seed is not None and not (options.text or options.random):
        raise UserError("--seed has no effect without --text or --random")
    options.seed = options.seed or 0
    if options.drop and options.to == "vlm":
        raise UserError("--drop has no effect with --to=vlm")


def _typed(views: Mapping[str, TensorView], dtype: str | None) -> dict[str, TensorView]:
    if dtype is None:
        return dict(views)
    import jax.numpy as jnp

    whole = {name for name, view in views.items() if view.dtype.kind in "iub"}
    target = np.dtype(jnp.dtype(dtype))
    return {name: view if name in whole else cast(view, target) for name, view in views.items()}


def _open(options: argparse.Namespace) -> Any:
    from vlm.loading import expected_params, open_model, with_extra

    overrides = dict(map(_override, options.override))
    if options.image_size is not None:
        overrides["vision.image_size"] = options.image_size
    opened = with_extra(open_model(options.source, overrides=overrides, tokenizer=options.tokenizer))
    if opened.run is not None:
        from vlm.checkpoint import lazy_params

        opened = dataclasses.replace(opened, params=lazy_params(opened.run))
    weights = opened.family.weights

    def imported(model: Any) -> Any:
        return weights.Imported(model.config, dict(model.params), model.origin, list(model.notes), dict(model.extra))

    def shapes(config: Any) -> Mapping[str, Any]:
        return expected_params(opened.family, config)

    built = imported(opened)
    if options.text is not None:
        text = open_model(options.text)
        if text.family is not opened.family or not hasattr(weights, "assemble"):
            raise UserError(f"--text: {opened.family.name} cannot take a text encoder from {text.family.name}")
        built = weights.assemble(imported(text), built, shapes=shapes, seed=options.seed)
    if options.task is not None:
        if not hasattr(weights, "to_task"):
            raise UserError(f"--task: {opened.family.name} has one kind of model only")
        seed = options.seed if options.random else None
        built = weights.to_task(built, options.task, shapes=shapes, num_labels=options.labels, seed=seed)
    parts = {"config": built.config, "params": built.params, "origin": built.layout, "notes": built.notes}
    return dataclasses.replace(opened, **parts, extra=built.extra)


def _override(argument: str) -> tuple[str, Any]:
    key, equals, text = argument.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"--override: expected KEY=VALUE, found {argument!r}")
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text


def _write_foreign(options: argparse.Namespace, opened: Any, processor: Any, bar: Any, notes: list[str]) -> None:
    """Writes Hugging Face's format, or the authors' .pth file, and prints the notes, more of them than given."""
    weights, views, extra = opened.family.weights, opened.params, opened.extra
    if options.to == "original" and not hasattr(weights, "write_original"):
        raise UserError(f"--to=original: {opened.family.name} is written for transformers only (--to=hf)")
    if options.to == "hf" and opened.extra:
        notes.append(
            f"left out {', '.join(sorted({n.split('/')[0] for n in extra}))}: transformers has no place for it"
        )
        extra = {}
    everything = {**views, **{f"{_EXTRA}{name}": view for name, view in extra.items()}}
    with new_folder(options.target) as folder, _random_access(opened, everything, options.target) as found:
        views = {name: view for name, view in found.items() if not name.startswith(_EXTRA)}
        extra = {n.removeprefix(_EXTRA): view for n, view in found.items() if n.startswith(_EXTRA)}
        if options.to == "original":
            write_pth(folder / "model.pth", weights.write_original(opened.config, views, extra), progress=bar.update)
        else:
            tensors, config = weights.write(opened.config, views, notes)
            write_tensors(folder, "model", tensors, metadata={"format": "pt"}, progress=bar.update)
            write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())
        if processor is not None:
            processor.save(folder)
    for note in notes:
        print(f"note: {note}")


def _without(pattern: str | None, opened: Any) -> tuple[Any, list[str]]:
    """The model without the parameters whose paths match, and those paths."""
    if pattern is None:
        return opened, []
    names = [*opened.params, *opened.extra]
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise UserError(f"--drop: {pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise UserError(f"--drop: {pattern!r} matches none of {listing(names, 4)}")
    views, extra = ({n: view for n, view in part.items() if n not in found} for part in (opened.params, opened.extra))
    config = opened.family.weights.without(opened.config, views)
    return dataclasses.replace(opened, config=config, params=views, extra=extra), found


@contextlib.contextmanager
def _random_access(opened: Any, views: Mapping[str, TensorView], target: Path) -> Iterator[Mapping[str, TensorView]]:
    """The views themselves, or of a training run views of a temporary, memory-mapped copy beside the target.

    Other layouts take one layer after another out of stacked parameters, and a run's leaves are read whole.
    """
    if opened.run is None:
        yield views
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.absolute().name}.", dir=target.absolute().parent) as folder:
        path = Path(folder) / "params.safetensors"
        write_safetensors(path, views)
        yield open_tensors(path)


if __name__ == "__main__":
    sys.exit(main())
