"""Evaluates a checkpoint with the evaluations that a configuration lists under `config.eval`.

    python eval.py --config=configs/altclip.py:tiny --checkpoint=runs/tiny --output=results/tiny.json
    python eval.py --checkpoint=runs/tiny --limit=100

The checkpoint is a model folder, a training workdir, a Hugging Face folder or an original .pth/.pt file. Of a training
workdir the configuration is known and may be left out. With --output the result is written there, with one .jsonl per
evaluation (a line per example) and an .html page beside it. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.config import build, command_line, config_hash, parse_command, parse_config_flag
from vlm.errors import UserError, exit_on_user_error
from vlm.heap import keep_freed_memory
from vlm.hosts import add_host_flags, connect, may_end_alone
from vlm.schema import Config

UNREAD = {
    "model": "the architecture is the checkpoint's",
    "processor": "tokenizer and image settings are the checkpoint's",
    "precision": "--dtype chooses in what is stored and computed",
    **dict.fromkeys(("family", "loss", "data", "init", "optimizer", "remat", "train"), "only training reads it"),
}
"""Sections of the configuration that an evaluation does not depend on."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__ or "")
    parser.add_argument("--checkpoint", metavar="PATH", help="what to evaluate")
    parser.add_argument("--output", metavar="FILE.json", help="where the results go; nothing is written without it")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N examples of every data set")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this evaluation; may be repeated")
    parser.add_argument("--ema", action="store_true", help="the averaged parameters of a training run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights and computation; default: as stored"
    )
    add_host_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with may_end_alone(), exit_on_user_error():
        options, config = parse_command(arguments(), argv, UNREAD)
        if not options.checkpoint:
            raise UserError("--checkpoint=PATH is missing; see --help")
        if not Path(options.checkpoint).exists():
            raise UserError(f"--checkpoint: no such file or folder: {options.checkpoint}")
        if config is None:
            config = _recorded(Path(options.checkpoint))
        keep_freed_memory()
        connect(options)
        metrics = evaluate(config, build(Config, config, ""), options)
    print(json.dumps(metrics, ensure_ascii=False))
    return 0


def evaluate(config: Any, settings: Config, options: argparse.Namespace) -> dict[str, float]:
    """Checks everything, loads the model onto all devices, evaluates."""
    import jax

    import vlm
    from vlm import evaluation, sharding
    from vlm.checkpoint.processes import from_primary

    specs = _chosen(settings, options.only)
    if options.output:
        from_primary(lambda: evaluation.check_output(Path(options.output)))
    plan = evaluation.prepare(specs, limit=options.limit)
    checkpoint = _pinned(Path(options.checkpoint))
    mesh, rules = sharding.make_mesh(settings.sharding.mesh), settings.sharding.rules
    with sharding.use(mesh, rules):
        model, params, processor = vlm.load(checkpoint, mesh=mesh, rules=rules, dtype=options.dtype, ema=options.ema)
        metrics = evaluation.run(
            plan,
            model,
            params,
            processor,
            mesh=mesh,
            batch_axes=sharding.batch_axes(rules),
            output=options.output,
            about=_about(checkpoint, config, options),
            progress=jax.process_index() == 0,
        )
    return metrics


def _pinned(path: Path) -> Path:
    """Of a training workdir the newest step as of now, so that what is recorded is what is loaded."""
    if not (path / "checkpoints").is_dir():
        return path
    from vlm.checkpoint.reading import find_step

    return find_step(path)


def _about(checkpoint: Path, config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on beside the data."""
    import vlm
    from vlm.manifest import MANIFEST_NAME
    from vlm.workdir import environment

    manifest = checkpoint / MANIFEST_NAME
    is_step = checkpoint.resolve().parent.name == "checkpoints" and checkpoint.name.isdigit()
    return {
        "checkpoint": str(checkpoint.resolve()),
        "checkpoint_manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
        "step": int(checkpoint.name) if is_step else None,
        "config": options.config,
        "config_sha256": config_hash(config),
        "limit": options.limit,
        "dtype": options.dtype,
        "ema": options.ema,
        "code": f"vlm {vlm.__version__}",
        "environment": environment(),
    }


def _chosen(settings: Config, names: Sequence[str] | None) -> dict[str, Any]:
    from vlm.errors import did_you_mean

    if not settings.eval:
        raise UserError("config.eval is empty: the configuration lists no evaluation")
    for name in names or ():
        if name not in settings.eval:
            raise UserError(f"--only: no evaluation {name!r}{did_you_mean(name, settings.eval)}")
    return {name: spec for name, spec in settings.eval.items() if not names or name in names}


def _recorded(checkpoint: Path) -> Any:
    """The configuration that a training run wrote beside its checkpoints."""
    folders = [checkpoint, *checkpoint.absolute().parents][:3]
    for folder in folders:
        if (folder / "checkpoints").is_dir() and (folder / "config.json").is_file():
            return parse_config_flag(str(folder / "config.json"))
    raise UserError("--config=FILE is missing (only of a training workdir the configuration is known); see --help")


if __name__ == "__main__":
    sys.exit(main())
