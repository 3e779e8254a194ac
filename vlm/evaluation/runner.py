"""Runs the evaluations of a configuration: checks all of them first, then one after the other, then writes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlm.checkpoint.processes import from_primary
from vlm.errors import UserError, did_you_mean
from vlm.evaluation import results as files
from vlm.evaluation.captions import Captions, CaptionsConfig
from vlm.evaluation.classify import Classification, ClassificationConfig
from vlm.evaluation.dialog import DialogConfig, VisualDialog
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Checks, Evaluator, Result
from vlm.evaluation.extract import Extract, ExtractConfig
from vlm.evaluation.image_text import Retrieval, RetrievalConfig
from vlm.evaluation.linear_probe import LinearProbe, LinearProbeConfig
from vlm.evaluation.losses import Losses, LossesConfig
from vlm.evaluation.matching import MatchingConfig, MatchingRetrieval
from vlm.evaluation.statements import Nlvr2, Nlvr2Config
from vlm.evaluation.vqa import Vqa, VqaConfig
from vlm.evaluation.zero_shot import ZeroShot, ZeroShotConfig
from vlm.family import NO_PROCESSOR
from vlm.metrics import Progress
from vlm.strict import build, fraction, plain

KINDS: dict[str, tuple[type, Any]] = {
    "zero_shot": (ZeroShotConfig, ZeroShot),
    "retrieval": (RetrievalConfig, Retrieval),
    "linear_probe": (LinearProbeConfig, LinearProbe),
    "embeddings": (ExtractConfig, Extract),
    "captions": (CaptionsConfig, Captions),
    "vqa": (VqaConfig, Vqa),
    "matching_retrieval": (MatchingConfig, MatchingRetrieval),
    "nlvr2": (Nlvr2Config, Nlvr2),
    "classification": (ClassificationConfig, Classification),
    "losses": (LossesConfig, Losses),
    "visual_dialog": (DialogConfig, VisualDialog),
}


@dataclasses.dataclass(frozen=True)
class Feeding:
    """How an evaluation is fed, the settings common to every kind.

    Attributes:
      batch_size: images or texts per step over all devices.
      num_workers: threads per host that decode images.
      max_skip_fraction: the evaluation stops when more than this share of the examples is unreadable.
    """

    batch_size: int = 64
    num_workers: int = 2
    max_skip_fraction: float = 0.001

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(f"expected batch_size of at least 1 and num_workers of at least 0, found {self}")
        fraction(self, "max_skip_fraction")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Evaluations that are ready to run: everything that can be checked without a model has been."""

    specs: dict[str, Any]
    evaluators: dict[str, tuple[Evaluator, Feeding]]


def prepare(specs: Mapping[str, Any], *, limit: int | None = None) -> Plan:
    """Checks and opens the evaluations of `config.eval`.

    Args:
      specs: {name: {"kind": one of `KINDS`, settings of that kind, batch_size, num_workers}}.
      limit: only the first so many examples of each data set.

    Raises:
      UserError: an unknown kind or setting, missing data, class names that do not fit, …
    """
    plain_specs = {str(name): plain(spec) for name, spec in specs.items()}
    if limit is not None and limit < 1:
        raise UserError(f"--limit: expected at least 1, found {limit}")
    return Plan(plain_specs, {name: _prepare(name, spec, limit) for name, spec in plain_specs.items()})


def run(
    specs: Mapping[str, Any] | Plan,
    model: Any,
    params: Any,
    processor: Any,
    *,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = ("data", "fsdp"),
    output: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    limit: int | None = None,
    progress: bool = True,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates a model; every host of a multi-host program calls this and gets the metrics.

    Args:
      specs: `config.eval`, or what `prepare` made of it.
      mesh: where `params` lie; by default the mesh entered with `jax.set_mesh`, if any.
      batch_axes: mesh axes that batches are split over.
      output: name of the JSON result; JSONL and HTML files go beside it. None: nothing is written.
      about: what is evaluated (checkpoint, step, configuration hash, …), kept with the results.
      poll: called on every host before every batch; what it raises, on all of them, ends the evaluation.

    Returns:
      {"evaluation/metric": value}.

    Raises:
      UserError: as `prepare`; also when the model or processor cannot do what is asked, or, on every host, when the
        first one cannot write.
    """
    plan = specs if isinstance(specs, Plan) else prepare(specs, limit=limit)
    if output is not None:
        from_primary(lambda: files.check_output(Path(output)))
    if processor is None:
        raise UserError(f"evaluation: the checkpoint {NO_PROCESSOR}")
    if mesh is None:
        current = jax.sharding.get_mesh()
        mesh = None if current.empty else current
    check(plan, model, params, processor, mesh=mesh, batch_axes=batch_axes)
    embedder = Embedder(model, params, processor, mesh, batch_axes, poll=poll)
    results: dict[str, Result] = {}
    for name, (evaluator, feeding) in plan.evaluators.items():
        fed = dataclasses.replace(embedder, **plain(feeding))
        if isinstance(evaluator, Extract) and output is not None:
            evaluator = dataclasses.replace(evaluator, folder=Path(output).with_suffix("") / name)
        try:
            results[name] = _run(name, evaluator, fed, progress and jax.process_index() == 0)
        except UserError as error:
            raise UserError(f"config.eval.{name}: {error}") from error
    if output is not None:
        from_primary(lambda: files.write(Path(output), results, plan.specs, about or {}))
    return files.flat(results)


def _prepare(name: str, spec: Any, limit: int | None) -> tuple[Evaluator, Feeding]:
    path = f"eval.{name}"
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UserError(f"config.eval: {name!r} is not a name (letters, digits, '_', '-', '.'), it names files too")
    if not isinstance(spec, (Mapping, ConfigDict)):
        raise UserError(f"config.{path}: expected a mapping, found {spec!r:.60}")
    kind = spec.get("kind")
    if kind not in KINDS:
        raise UserError(f"config.{path}.kind: unknown evaluation {kind!r}{did_you_mean(str(kind), KINDS)}")
    common = {field.name for field in dataclasses.fields(Feeding)}
    feeding = build(Feeding, {key: value for key, value in spec.items() if key in common}, path)
    config_type, evaluator = KINDS[kind]
    config = build(config_type, {key: value for key, value in spec.items() if key not in {"kind", *common}}, path)
    return evaluator.prepare(config, f"config.{path}", limit), feeding


def check(
    plan: Plan, model: Any, params: Any, processor: Any, *, mesh: Mesh | None, batch_axes: tuple[str, ...]
) -> None:
    """Finds what the model cannot do before anything runs.

    Args:
      params: arrays, or what has their shapes and dtypes. The rest is as for `run`.

    Raises:
      UserError: an evaluation asks the model or the processor for what it does not have.
    """
    embedder = Embedder(model, params, processor, mesh, batch_axes)
    contrastive = []
    for name, (evaluator, _) in plan.evaluators.items():
        if not isinstance(evaluator, Checks):
            contrastive.append(evaluator)
            continue
        try:
            evaluator.check(embedder)
        except UserError as error:
            raise UserError(f"config.eval.{name}: {error}") from error
    if contrastive:
        embedder.check(texts=any(evaluator.uses_text for evaluator in contrastive))


def _run(name: str, evaluator: Evaluator, embedder: Embedder, show: bool) -> Result:
    progress = Progress(evaluator.size, enabled=show, unit=name)
    try:
        return evaluator(embedder, progress.moved)
    finally:
        progress.close()
