"""From settings to the parts of a run: the model, its loss, the optimizer, and how the state starts.

Nothing is allocated here, so that a dry run of an 80-billion-parameter model fits on a laptop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vlm import flops, metrics
from vlm.checkpoint.processes import from_primary
from vlm.checks import check_vocabularies, tracing
from vlm.data.batch import LoaderSettings
from vlm.data.loader import Loader, Transform
from vlm.data.others import WithOthers
from vlm.data.source import Source, open_sources
from vlm.data.teacher_cache import TeacherCache, WithPatchLabels, WithTarget
from vlm.errors import UserError
from vlm.family import Family
from vlm.layers.pixels import normalise_pixels
from vlm.models import get_family
from vlm.optimizer import Optimizer, make_optimizer
from vlm.padding import TextLengths
from vlm.preemption import Preemption
from vlm.schema import Config
from vlm.sharding import local_rows, put_batch, reads_first, unbox
from vlm.strict import build
from vlm.training import LossFn, StateInit, make_train_step, trace_step
from vlm.tree import flatten, listing


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts that `experiment` made; `alike`: whether all batches have the same arrays, as those of one stream."""

    family: Family
    model_config: Any
    model: Any
    loss_config: Any
    loss: LossFn
    optimizer: Optimizer
    init: StateInit
    alike: bool = True


def experiment(settings: Config, remat: str | None = None) -> Experiment:
    """Builds the parts from settings; `remat` replaces the configured policy.

    Raises:
      UserError: an unknown family or setting, parameter groups that do not fit the model.
    """
    family = get_family(settings.family)
    inherited = {"dtype": settings.precision.compute, "remat": remat or settings.remat}
    model_config = build(family.config_type, settings.model, "model", inherited)
    loss_config = build(family.loss_type, settings.loss, "loss", inherited)
    processor_config: Any = build(family.processor_type, settings.processor, "processor")
    if settings.train.text_lengths and not getattr(model_config, "mask_text_padding", True):
        raise UserError(
            "config.train.text_lengths: this model attends to padding (mask_text_padding=False): expected ()"
        )
    if settings.train.pack_texts > 1 and not getattr(loss_config, "packs_texts", False):
        raise UserError(f"config.train.pack_texts: this objective of {family.name} reads whole rows: expected 1")
    if settings.data.teacher_cache is not None:
        if not hasattr(loss_config, "check_targets"):
            unread = f"no objective of {family.name} learns from precomputed embeddings"
            raise UserError(f"config.data.teacher_cache: {unread}")
        loss_config.check_targets(settings.data.teacher_cache, processor_config)
    if hasattr(processor_config, "check"):
        processor_config.check(model_config, loss_config)
    text_lengths(settings).check(_row_lengths(settings, family, processor_config))
    model = family.module(model_config)

    def init_params(key: jax.Array) -> Any:
        keys = {"params": jax.random.fold_in(key, 0), "dropout": jax.random.fold_in(key, 1)}
        example = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), family.example(model_config))
        return model.init(keys, **example)["params"]

    def init_extra(params: Any, key: jax.Array) -> Any:
        return family.init_extra(model, params, key, loss_config)

    pixels: Any = getattr(processor_config, "image", None)

    def loss(params: Any, extra: Any, batch: Any, rng: jax.Array) -> Any:
        if "image" in batch and batch["image"].dtype == jnp.uint8:
            batch = {**batch, "image": normalise_pixels(batch["image"], pixels)}
        return family.loss(model, params, extra, batch, rng, loss_config)

    with tracing("the model cannot be built from its configuration"):
        paths = flatten(unbox(jax.eval_shape(lambda: init_params(jax.random.key(0)))))
    optimizer = make_optimizer(settings.optimizer, paths, settings.train.steps)
    _check_locked(loss_config, optimizer)
    init = StateInit(init_params, init_extra, optimizer, settings.precision.frozen)
    return Experiment(family, model_config, model, loss_config, loss, optimizer, init, not settings.data.streams)


def _row_lengths(settings: Config, family: Family, processor_config: Any) -> list[int]:
    """Lengths of the rows of text that the sources' examples give; no file is opened."""
    rows, found = family.processor.rows, []
    by_fields = "fields" in inspect.signature(rows).parameters
    for fields in (spec.get("fields") for spec in settings.data.sources):
        if by_fields:  # of a source that names no fields, examples may be pairs or texts
            kinds = [rows(processor_config, set(fields))] if fields else [rows(processor_config, {"text"})]
        else:
            kinds = [rows(processor_config)]
        found += [row["mask"][0][0] for row in kinds if "mask" in row]
    return found


def _check_locked(loss_config: Any, optimizer: Optimizer) -> None:
    """Refuses to train what the objective does not reach: weight decay alone would shrink it."""
    locked = getattr(loss_config, "locked", "")
    loose = [path for path, group in optimizer.groups.items() if not group.freeze and re.fullmatch(locked, path)]
    if loose:
        raise UserError(
            f"config.optimizer.groups: the objective gives no gradient to {listing(loose, 4)}; freeze {locked!r}"
        )


def make_processor(settings: Config, family: Family) -> Any:
    """The family's processor as `config.processor` describes it.

    Raises:
      UserError: an unknown setting, a tokenizer that is not there or has more tokens than the model.
    """
    model, loss = build(family.config_type, settings.model, "model"), build(family.loss_type, settings.loss, "loss")
    config: Any = build(family.processor_type, settings.processor, "processor")
    if hasattr(config, "for_run"):
        config = config.for_run(model, loss)
    processor = family.processor.from_config(config)
    check_vocabularies(processor, model, loss)
    return processor


def make_loader(settings: Config, processor: Any, split: NamedSharding, ledger: str | os.PathLike | None) -> Loader:
    """The training data; this host reads the rows that its devices hold under `split`.

    Args:
      ledger: folder for the list of unreadable examples.

    Raises:
      UserError: data that cannot be opened.
    """
    data = settings.data
    start, stop = local_rows(split, data.batch_size)
    loader = LoaderSettings(
        batch_size=data.batch_size,
        seed=data.seed,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        host_index=start // (stop - start),
        host_count=data.batch_size // (stop - start),
        max_skip_fraction=data.max_skip_fraction,
        timeout_seconds=data.timeout_seconds,
    )
    if not reads_first(split, data.batch_size):  # the host with the same rows meets the same unreadable examples
        ledger = None
    sources, weights, transform = open_data(settings, processor, data.sources)
    streams: Any = {"members": data.members, "shares": data.streams} if data.streams else {}
    return Loader(sources, transform, loader, weights=weights, **streams, ledger=ledger)


def open_data(
    settings: Config, processor: Any, specs: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Source], list[float], Transform]:
    """Opens sources; returns them with their weights, and what makes rows of their examples.

    Raises:
      UserError: data that cannot be opened.
    """
    opened, weights = open_sources(specs)
    sources = [WithOthers(source) for source in opened] if getattr(processor, "reads_others", False) else opened
    transform = processor.example
    if settings.data.teacher_cache is not None:
        cache = TeacherCache(settings.data.teacher_cache)
        target = build(get_family(settings.family).loss_type, settings.loss, "loss").target
        if cache.teacher.split(":")[0] != target:
            raise UserError(
                f"{cache.path}: embeddings of {cache.teacher.split(':')[0]!r}, config.loss.target is {target!r}"
            )
        transform = WithTarget(transform, cache)
    if settings.data.codebook_cache is not None:
        transform = WithPatchLabels(transform, _codebook_cache(settings, processor))
    return sources, weights, transform


def _codebook_cache(settings: Config, processor: Any) -> TeacherCache:
    path, kind = settings.data.codebook_cache or "", "visual words"
    cache = TeacherCache(path)
    if cache.teacher.split(":")[0] != "codebook":
        raise UserError(f"{path}: expected {kind}, found embeddings of {cache.teacher.split(':')[0]!r}")
    if not hasattr(processor, "check_patch_labels"):
        raise UserError(f"config.data.codebook_cache: this family's pictures have no {kind}")
    processor.check_patch_labels(cache.dim)
    known = build(get_family(settings.family).config_type, settings.model, "model").image_vocab_size
    if cache.vocab_size not in (None, known):
        raise UserError(
            f"config.model.image_vocab_size: expected the {cache.vocab_size} {kind} of {path}, found {known}"
        )
    return cache


def text_lengths(settings: Config) -> TextLengths:
    """What of the texts' padding the training step leaves out."""
    return TextLengths(settings.train.text_lengths, settings.train.pack_texts, settings.optimizer.accumulation_steps)


def device_batches(
    settings: Config, batches: Iterator[Any], split: NamedSharding, preemption: Preemption, count: int
) -> Iterator[tuple[Mapping[str, jax.Array], float, float]]:
    """Yields `count` of (batch on the devices, its real tokens, seconds waited for it), or fewer: see `in_step`.

    Copies run beside the step before.
    """
    rows, texts = settings.data.batch_size, text_lengths(settings)

    def draw() -> tuple[Any, float]:
        began = time.monotonic()
        batch = next(batches)
        return batch, time.monotonic() - began

    for batch, waited in preemption.in_step(draw, count):
        tokens = float(batch["mask"].sum()) * rows / len(batch["mask"]) if "mask" in batch else 0.0
        if jax.process_count() == 1:  # several hosts choose a length in the step
            batch = texts.fit(batch)
        yield put_batch(batch, split, rows), tokens, waited


class Steps:
    """The training step, compiled for each structure of batches (names, shapes, dtypes) when the first of it comes."""

    def __init__(self, settings: Config, parts: Experiment, split: NamedSharding):
        self._settings, self._parts, self._split = settings, parts, split
        self._compiled: dict[Any, tuple[Any, flops.StepFlops]] = {}

    def __contains__(self, batch: Mapping[str, jax.Array]) -> bool:
        """Whether the step for batches like this one is there already."""
        return _structure(batch) in self._compiled

    def __call__(self, state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, flops.StepFlops]:
        """Returns the step for batches like this one, and its model FLOPs."""
        key = _structure(batch)
        if key not in self._compiled:
            self._compiled[key] = compile_step(self._settings, self._parts, state, batch, self._split)
        return self._compiled[key]


def _structure(batch: Mapping[str, jax.Array]) -> frozenset:
    return frozenset((name, array.shape, array.dtype) for name, array in batch.items())


def compile_step(
    settings: Config,
    parts: Experiment,
    state: Any,
    batch: Any,
    split: NamedSharding,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[Any, flops.StepFlops]:
    """Compiles the training step for this state and batch; also returns its model FLOPs."""
    train, accumulation = settings.train, settings.optimizer.accumulation_steps
    texts = text_lengths(settings)
    sizes = texts.sizes(batch) if jax.process_count() > 1 else []  # one host has shortened its batch already

    def trace(parts: Experiment, batch: Any, texts: TextLengths | None = None) -> Any:
        step = make_train_step(parts.loss, parts.optimizer, train.seed, accumulation, texts)
        return trace_step(step, state, batch, split)

    traced = trace(parts, batch, texts if sizes else None)
    plain = parts if settings.remat == "none" else experiment(settings, remat="none")
    compiled = traced.lower().compile(compiler_options=compiler_options)
    if not sizes:
        return compiled, flops.StepFlops(flops.count_flops((traced if plain is parts else trace(plain, batch)).jaxpr))
    shapes = jax.eval_shape(dict, batch)
    shortened = [jax.eval_shape(lambda batch, size=size: texts.shorten(batch, size), shapes) for size in sizes]
    counts = [flops.count_flops(trace(plain, batch).jaxpr) for batch in shortened]
    return compiled, flops.StepFlops(counts[-1], tuple(sizes), tuple(counts))


@contextlib.contextmanager
def make_report(
    settings: Config,
    config: Any,
    workdir: Path,
    start: int,
    streams: Callable[[int], Mapping[str, int]] | None = None,
) -> Iterator[metrics.Report]:
    """The report of a run from step `start` on (`streams`: see `metrics.Report`); only the first host writes.

    Raises:
      UserError: on every host, when the files cannot be opened.
    """
    primary, train = jax.process_index() == 0, settings.train
    kind = jax.devices()[0].device_kind
    peak = flops.peak_flops(kind)
    progress = metrics.Progress(train.steps, start, enabled=primary)
    writers: list[metrics.MetricsWriter] = []  # of the first host

    def open_writer() -> None:
        options = {"tensorboard": train.tensorboard, "wandb": train.wandb, "config": config.to_dict()}
        writers.append(metrics.MetricsWriter(workdir, start, **options))

    from_primary(open_writer)
    writer = writers[0] if writers else None
    known = f"peak {peak / 1e12:g} TFLOP/s each" if peak else "peak unknown, so is the utilisation"
    progress.say(f"{jax.device_count()} x {kind} ({known})")
    rates = metrics.Rates(settings.data.batch_size, peak * jax.device_count() if peak else None)
    report = metrics.Report(rates, progress, writer, train.log_every, train.max_bad_steps, train.steps, streams)
    try:
        yield report
        report.settle()
    finally:
        progress.close()
        if writer is not None:
            writer.close()
