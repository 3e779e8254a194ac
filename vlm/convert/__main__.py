"""Converts checkpoints: `python -m vlm.convert SOURCE TARGET [--to=vlm|hf] [--dtype=bfloat16]`.

SOURCE is a model folder, a training workdir, a Hugging Face folder or an original .pth/.pt file; what it is follows
from its files. TARGET is a new folder. Memory stays near the largest tensor, whatever the model's size;
a training workdir to hf needs the model's size on disk once more while it runs.

    python -m vlm.convert BAAI/AltCLIP altclip                     # published weights to ours
    python -m vlm.convert altclip altclip_hf --to=hf               # and back, for transformers
    python -m vlm.convert CLIP_FOLDER new --text=XLMR_FOLDER       # a new AltCLIP from CLIP and XLM-R, to be trained
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
from vlm.convert.views import TensorView, cast
from vlm.convert.writer import check_new_folder, new_folder, write_safetensors, write_tensors
from vlm.errors import Parser, UserError, exit_on_user_error
from vlm.manifest import write_atomically

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a wrong input ends with one line and exit status 2."""
    with exit_on_user_error():
        convert(_parse(arguments))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m vlm.convert", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--to", choices=("vlm", "hf"), default="vlm", help="what to write (default: vlm)")
    parser.add_argument("--dtype", choices=DTYPES, help="element type to write (default: as stored)")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="take the text encoder from this model instead")
    parser.add_argument("--seed", type=int, default=0, help="for weights that --text leaves to be initialised")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change an architecture value, e.g. vision.activation=gelu",
    )
    parser.add_argument("--drop", metavar="REGEX", help="leave out parameters whose path matches (--to=hf)")
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    """Converts as the parsed options say, printing notes and a summary.

    Raises:
        UserError: see `vlm.load`; the target exists; nothing in transformers holds such a model.
    """
    from vlm.loading import load_processor, save_views

    started = time.perf_counter()
    check_new_folder(options.target)
    opened = _open(options)
    views = dict(opened.params)
    if options.dtype:
        import jax.numpy as jnp

        views = {name: cast(view, np.dtype(jnp.dtype(options.dtype))) for name, view in views.items()}
    for note in opened.notes:
        print(f"note: {note}")
    processor = load_processor(opened)
    if processor is None:
        print("note: no tokenizer and image settings beside the weights; the result has none")
    total = sum(view.nbytes for view in views.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        if options.to == "vlm":
            save_views(options.target, opened.family, opened.config, views, processor, bar.update)
        else:
            _write_hf(options, dataclasses.replace(opened, params=views), processor, bar)
    count = sum(math.prod(view.shape) for view in views.values())
    seconds = time.perf_counter() - started
    print(
        f"{options.target}: {opened.origin} -> {options.to}, {count:,} parameters, {total:,} bytes in {seconds:.1f} s"
    )


def _open(options: argparse.Namespace) -> Any:
    from vlm.loading import expected_params, open_model

    opened = open_model(options.source, overrides=dict(map(_override, options.override)))
    if opened.run is not None:
        from vlm.checkpoint import lazy_params

        opened = dataclasses.replace(opened, params=lazy_params(opened.run))
    if options.text is None:
        return opened
    text = open_model(options.text)
    if text.family is not opened.family or not hasattr(opened.family.weights, "assemble"):
        raise UserError(f"--text: {opened.family.name} cannot take a text encoder from {text.family.name}")
    weights = opened.family.weights
    parts = [weights.Imported(m.config, dict(m.params), m.origin, list(m.notes)) for m in (text, opened)]
    built = weights.assemble(*parts, shapes=lambda c: expected_params(opened.family, c), seed=options.seed)
    return dataclasses.replace(opened, config=built.config, params=built.params, origin=built.layout, notes=built.notes)


def _override(argument: str) -> tuple[str, Any]:
    key, equals, text = argument.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"--override: expected KEY=VALUE, found {argument!r}")
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return key, text


def _write_hf(options: argparse.Namespace, opened: Any, processor: Any, bar: Any) -> None:
    views = opened.params
    if options.drop:
        dropped = [name for name in views if re.fullmatch(options.drop, name)]
        print(f"note: left out {', '.join(dropped) or 'nothing'}")
        views = {name: view for name, view in views.items() if name not in dropped}
        opened = dataclasses.replace(opened, config=opened.family.weights.without(opened.config, views))
    with new_folder(options.target) as folder, _random_access(opened, views, options.target) as views:
        tensors, config = opened.family.weights.write(opened.config, views)
        write_tensors(folder, "model", tensors, metadata={"format": "pt"}, progress=bar.update)
        write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())
        if processor is not None:
            processor.save(folder)


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
