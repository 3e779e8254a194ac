"""CapFilt (Li et al. 2022): a captioner writes a text for every web image, a filter removes texts that do not match.

    python -m vlm.capfilt 'cc3m/{00000..00331}.tar' --captioner=CHECKPOINT --filter=CHECKPOINT --output=cc3m_capfilt

The captioner is BLIP fine-tuned for captions, the filter BLIP fine-tuned for retrieval. The texts of the shards and the
written ones pass the same filter. Output: tar shards with a record per surviving pair (image, .txt, and .json with
provenance and probability), which training reads as {"kind": "tar", "path": "cc3m_capfilt/*.tar"}. What was counted is
in a .json beside each shard; the last line on standard output is the sum as one JSON object.

Run the same command again and it goes on with the unfinished shards. To share the shards among processes, on any number
of machines that see the folders, start each with --num_processes=N --process_id=I; they need not know of each other
(--coordinator or --distributed connects them where the hardware asks for it). The result is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.errors import Parser, UserError, exit_on_user_error
from vlm.heap import keep_freed_memory
from vlm.hosts import add_host_flags, connect, may_end_alone


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m vlm.capfilt", description=__doc__)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="web images with texts: tar file, glob or {a..b}")
    parser.add_argument("--captioner", required=True, metavar="CHECKPOINT", help="any BLIP model that writes captions")
    parser.add_argument("--filter", required=True, metavar="CHECKPOINT", help="any BLIP model with a matching head")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new, or of an earlier run of this command")
    parser.add_argument(
        "--human", action="append", default=[], metavar="SHARDS", help="tar shards whose pairs pass unfiltered"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="least matching probability (default 0.5)")
    parser.add_argument("--score_only", action="store_true", help="only count; write no shards")
    parser.add_argument("--image_field", metavar="NAME", help="of the image in the records (default: the usual names)")
    parser.add_argument(
        "--text_field", metavar="NAME", help="of the text, e.g. json/alt; then every record must have it"
    )
    captions = parser.add_argument_group("captions")
    captions.add_argument("--prompt", default="a picture of ", help="what they begin with (default 'a picture of ')")
    captions.add_argument("--top_p", type=float, default=0.9)
    captions.add_argument("--top_k", type=int, default=50)
    captions.add_argument("--repetition_penalty", type=float, default=1.1)
    captions.add_argument("--min_length", type=int, default=5, help="tokens, the prompt included (default 5)")
    captions.add_argument("--max_length", type=int, default=20, help="tokens, the prompt included (default 20)")
    captions.add_argument("--max_words", type=int, default=30, help="kept of any cleaned text (default 30)")
    captions.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="images over all devices (default 64)")
    parser.add_argument("--devices", type=int, metavar="N", help="of this process (default: all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    parser.add_argument(
        "--num_workers", type=int, default=2, metavar="N", help="threads that decode images (default 2)"
    )
    parser.add_argument(
        "--max_skip_fraction", type=float, default=0.01, metavar="F", help="stop above it (default 0.01)"
    )
    add_host_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with may_end_alone(), exit_on_user_error():
        options = arguments().parse_args(argv)
        _check(options)
        keep_freed_memory()
        result = run(options, *_share(options))
    print(json.dumps(result))
    return 0


def run(options: argparse.Namespace, index: int, count: int) -> dict[str, Any]:
    """Processes every `count`-th shard from `index` on; returns the sum over the shards finished by anyone so far."""
    import jax

    from vlm import sharding
    from vlm.capfilt import output
    from vlm.checkpoint.processes import any_process
    from vlm.schema import MeshConfig, ShardingConfig

    folder = Path(options.output).expanduser()
    shards = output.input_shards(options.shards, options.human, folder)
    output.check_folder(folder)
    for shard in shards:
        output.finished(folder, shard)  # refuses outputs of other inputs
    devices = jax.local_devices()
    if (options.devices or 1) > len(devices):
        raise UserError(f"--devices: expected at most {len(devices)}, found {options.devices}")
    mesh, rules = sharding.make_mesh(MeshConfig(), devices[: options.devices]), ShardingConfig().rules
    with sharding.use(mesh, rules):
        pipeline = _pipeline(options, folder, index, mesh, rules)
        _run_all(pipeline, folder, shards[index::count])
    any_process(True)  # where processes are connected, the first to finish must not be taken for dead
    return output.total(folder, shards)


def _check(options: argparse.Namespace) -> None:
    for flag in ("captioner", "filter"):
        if not Path(getattr(options, flag)).exists():
            raise UserError(f"--{flag}: no such file or folder: {getattr(options, flag)}")
    for flag in ("threshold", "max_skip_fraction"):
        if not 0 <= getattr(options, flag) <= 1:
            raise UserError(f"--{flag}: expected a number from 0 to 1, found {getattr(options, flag)}")
    least = {"batch_size": 1, "max_words": 1, "num_workers": 0, "seed": 0, "devices": 1}
    for flag, bound in least.items():
        if (value := getattr(options, flag)) is not None and value < bound:
            raise UserError(f"--{flag}: expected at least {bound}, found {value}")
    if options.seed >= 1 << 31:
        raise UserError(f"--seed: expected less than 2^31, found {options.seed}")
    if (options.image_field is None) != (options.text_field is None):
        raise UserError("--image_field and --text_field: give both or neither")


def _share(options: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many."""
    index, count = options.process_id, options.num_processes
    connected = options.distributed or options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if connected:
        connect(options)
        import jax

        return jax.process_index(), jax.process_count()
    if index is None and count is None:
        return 0, 1
    if index is None or count is None or not 0 <= index < count:
        found = f"found --process_id={index} and --num_processes={count}"
        raise UserError(f"--process_id: expected a number from 0 and below --num_processes, {found}")
    return index, count


def _pipeline(options: argparse.Namespace, folder: Path, index: int, mesh: Any, rules: Any) -> Any:
    import vlm
    from vlm import sharding
    from vlm.capfilt.models import Captioner, Filter, fingerprint
    from vlm.capfilt.output import claim_folder
    from vlm.capfilt.pipeline import Limit, Pipeline, Settings, recorded
    from vlm.data.ledger import SkipLedger
    from vlm.generation import GenerationConfig
    from vlm.predict.output import as_flags
    from vlm.strict import build

    sampling = ("top_p", "top_k", "repetition_penalty", "min_length", "max_length")
    try:
        given = {name: getattr(options, name) for name in sampling}
        generation = build(GenerationConfig, {"do_sample": True} | given, "captions")
    except UserError as error:
        raise UserError(as_flags(str(error), "captions", sampling)) from None
    names = {"image": options.image_field, "text": options.text_field}
    settings = Settings(
        options.threshold, options.seed, options.max_words, names if options.text_field else None, options.score_only
    )
    axes, rows = sharding.batch_axes(rules), -(-options.batch_size // mesh.size) * mesh.size
    paths = {"captioner": options.captioner, "filter": options.filter}
    loaded = {path: vlm.load(path, mesh=mesh, rules=rules, dtype=options.dtype) for path in set(paths.values())}
    captioner = Captioner(loaded[paths["captioner"]], generation, options.prompt, rows, options.max_words)
    if loaded[paths["captioner"]][0].pretrained_only:
        print("note: --captioner is a pretraining model; one fine-tuned for captions writes better", file=sys.stderr)
    matcher = Filter(loaded[paths["filter"]], mesh, axes)
    models = {name: fingerprint(loaded[path]) for name, path in paths.items()}
    claim_folder(folder, recorded(settings, generation, options.prompt, models))
    limit = Limit(options.max_skip_fraction)
    ledger = SkipLedger(folder, index)
    return Pipeline(folder, captioner, matcher, settings, rows, options.num_workers, ledger, limit)


def _run_all(pipeline: Any, folder: Path, shards: Sequence[Any]) -> None:
    """Makes what is missing, with a line of progress (in bytes of input, known without opening every shard)."""
    from vlm.capfilt import output
    from vlm.metrics import Progress

    unit, scale = ("MiB", 2**20) if sum(shard.size for shard in shards) >= 2**30 else ("KiB", 2**10)
    sizes = {shard.name: shard.size / scale for shard in shards}
    missing = [shard for shard in shards if output.finished(folder, shard) is None]
    before = sum(sizes.values()) - sum(sizes[shard.name] for shard in missing)
    progress = Progress(round(sum(sizes.values())), round(before), unit=unit)
    images = 0
    try:
        for shard in missing:
            if output.finished(folder, shard) is not None:
                continue  # by another process since

            def advance(share: float, more: int, done: float = before, size: float = sizes[shard.name]) -> None:
                nonlocal images
                images += more
                progress.moved(round(done + share * size), images)

            counts = pipeline.run(shard, advance)
            output.write_counts(folder, shard, counts)
            before += sizes[shard.name]
            progress.say(_line(shard.name, counts))
    finally:
        progress.close()


def _line(name: str, counts: dict[str, Any]) -> str:
    parts = [f"{name}: {counts['images']} images"]
    parts += [f"{kind} {counts[kind]['kept']}/{counts[kind]['texts']} kept" for kind in ("web", "synthetic")]
    parts += [f"{counts['human_texts']} human texts"] if counts["human_texts"] else []
    return " | ".join(parts + ([f"{counts['unreadable']} unreadable"] if counts["unreadable"] else []))


if __name__ == "__main__":
    sys.exit(main())
