"""The losses of pretraining on data that it has not seen: what is hidden in every example is always the same.

Means are over what a loss is a mean of (hidden tokens, hidden patches, pairs) in the whole data set, the last batch
included. The contrastive loss sets the pairs of a batch against each other: its mean is over the full batches.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm.data.others import WithOthers
from vlm.data.source import Source
from vlm.data.teacher_cache import TeacherCache, WithPatchLabels
from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Task
from vlm.evaluation.feed import Advance, trace
from vlm.family import COUNT
from vlm.layers.pixels import normalise_pixels
from vlm.models import FAMILIES, get_family
from vlm.strict import build


@dataclasses.dataclass(frozen=True)
class LossesConfig:
    """Settings of one evaluation of losses.

    Attributes:
      data: a source whose examples have what a batch of training has: an image, a `text`, or both.
      loss: the fields of the family's loss settings; by default its defaults.
      codebook_cache: visual words of the pictures computed before (`python -m vlm.precompute`).
      seed: of what is hidden, and of which captions are replaced.
    """

    data: dict[str, Any]
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    codebook_cache: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, found {self.seed}")


@dataclasses.dataclass(frozen=True)
class Losses(Task):
    """A prepared evaluation."""

    config: LossesConfig
    words: TeacherCache | None = None

    @classmethod
    def prepare(cls, config: LossesConfig, path: str, limit: int | None = None) -> Losses:
        """Opens the data; raises UserError where they are wrong."""
        words = TeacherCache(config.codebook_cache) if config.codebook_cache is not None else None
        return cls._open(config, path, limit, words)

    def check(self, embedder: Embedder) -> None:
        """Traces the losses on the first readable example; raises UserError where the model has none of it."""
        transform = self._transform(embedder.processor)
        for index in range(min(len(self.source), 16)):
            try:
                example = _Drawn(self.source, self.config.seed, embedder.processor)[index]
            except UserError:
                continue
            row = {name: array[None] for name, array in transform(example).items()}
            call = self._losses(embedder)
            found = trace("measure losses of such examples", call, embedder.params, {**row, "valid": np.ones(1, bool)})
            if not any(name.startswith(COUNT) for name in found):
                raise UserError(f"{type(embedder.model).__name__}: this family's losses are measured by training only")
            return

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Measures every loss of every example."""
        feed, losses, transform = embedder.feed, self._losses(embedder), self._transform(embedder.processor)
        start, stop = feed.local_rows()
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        readable = 0
        source = _Drawn(self.source, self.config.seed, embedder.processor)
        for fed in feed.examples(source, transform, self.note, advance):
            valid = np.zeros(feed.rows, bool)
            valid[fed.valid] = True
            found = feed.fetch(losses(embedder.params, feed.put({**fed.local, "valid": valid[start:stop]})))
            readable += len(fed.notes)
            for name in (name for name in found if not name.startswith(COUNT)):
                count = float(found.get(COUNT + name, 0.0))
                sums[name] = sums.get(name, 0.0) + (float(found[name]) * count if count else 0.0)
                counts[name] = counts.get(name, 0.0) + count
        metrics = {name: sums[name] / count for name, count in counts.items() if count}
        if not np.isfinite(list(metrics.values())).all():
            raise UserError("losses are not finite: has training diverged?")
        details = {"data_fingerprint": self.source.fingerprint, "counts": {name: int(counts[name]) for name in metrics}}
        return Result("losses", metrics, {}, readable, len(self.source) - readable, details)

    def _losses(self, embedder: Embedder) -> Any:
        families = map(get_family, FAMILIES)
        family = next((each for each in families if type(embedder.model) is each.module), None)
        if family is None:
            raise UserError(f"{type(embedder.model).__name__}: no family of this name has losses")
        config = build(family.loss_type, self.config.loss, "loss")
        pixels = getattr(embedder.processor, "image_settings", None)
        return functools.partial(_measure, family.loss, embedder.model, config, pixels)

    def _transform(self, processor: Any) -> Any:
        """The rows that training makes, of whole pictures."""
        if not hasattr(getattr(processor, "config", None), "augment"):
            raise UserError("this family's losses are measured by training only")
        settings = dataclasses.replace(processor.config, augment=None)
        if self.words is not None:
            settings = dataclasses.replace(settings, codebook_size=None)
        whole = copy.copy(processor)
        whole.config = settings
        transform = whole.example if self.words is None else WithPatchLabels(whole.example, self.words)

        def rows(example: dict[str, Any]) -> dict[str, np.ndarray]:
            rng = example.pop("rng")
            return transform(example, rng, True)

        return rows


class _Drawn:
    """A source whose examples hold the random numbers of their own, and where the processor wants it, the source."""

    def __init__(self, source: Source, seed: int, processor: Any):
        self._source = WithOthers(source) if getattr(processor, "reads_others", False) else source
        self._seed, self.name, self.fingerprint = seed, source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "rng": np.random.default_rng((self._seed, index))}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _measure(loss: Any, model: Any, config: Any, pixels: Any, params: Any, batch: Any) -> dict[str, jax.Array]:
    if pixels is not None and "image" in batch and batch["image"].dtype == jnp.uint8:
        batch = {**batch, "image": normalise_pixels(batch["image"], pixels)}
    _, (metrics, _) = loss(model, params, {}, batch, jax.random.key(0), config)
    return metrics
