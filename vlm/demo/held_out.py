"""FLAVA's pretraining losses on data that training has not seen, and what it says of hidden patches and words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import build, parse_config_flag
from vlm.schema import Config

SEED = 1
Batches = dict[str, list[dict[str, np.ndarray]]]
"""Of each stream: "pairs", "images", "text"."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A run, to be tried on held-out examples.

    Attributes:
      settings: of the run. parts: its model and loss (`vlm.experiment.Experiment`).
      processor: makes batches, and loads texts.
    """

    settings: Config
    parts: Any
    processor: Any

    @classmethod
    def of(cls, workdir: Path) -> HeldOut:
        """Reads a training workdir's configuration."""
        from vlm.experiment import experiment, make_processor

        settings = build(Config, parse_config_flag(str(workdir / "config.json")), "")
        parts = experiment(settings)
        return cls(settings, parts, make_processor(settings, parts.family))

    def batches(self, sources: Mapping[str, Sequence[Mapping[str, Any]]]) -> Batches:
        """Batches of each stream's sources as training would make them, always the same.

        Raises:
          UserError: data that cannot be opened, or examples that training could not use either.
        """
        return {stream: _batches(self.settings, self.processor, specs) for stream, specs in sources.items()}

    def random(self) -> Any:
        """The parameters that the run started from."""
        import jax

        from vlm.sharding import unbox

        return jax.jit(lambda: unbox(self.parts.init.params(self.settings.train.seed)))()

    def losses(self, params: Any, streams: Batches) -> dict[str, float]:
        """Every loss and accuracy of training, averaged over the batches."""
        import jax

        loss = jax.jit(self.parts.loss)
        values: dict[str, list[float]] = {}
        for batches in streams.values():
            for batch in batches:
                _, (metrics, _) = loss(params, {}, batch, jax.random.key(0))
                for name, value in metrics.items():
                    values.setdefault(name, []).append(float(value))
        return {name: float(np.mean(each)) for name, each in values.items()}

    def predictions(self, params: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The likeliest visual word of every patch int[B, P], and for pairs the likeliest token int[B, L].

        Of a batch of pairs or images, with its patches and tokens hidden.
        """
        names = ("image", "tokens", "mask", "patch_mask", "masked_tokens")
        output = _compiled(self.parts.model)(
            {"params": params}, **{name: batch[name] for name in names if name in batch}
        )
        if "tokens" not in batch:
            return {"patches": np.asarray(output.mim_logits[:, 1:].argmax(-1))}
        found = {"patches": output.mmm_image_logits, "tokens": output.mmm_text_logits}
        return {name: np.asarray(logits.argmax(-1)) for name, logits in found.items()}


@functools.lru_cache(maxsize=1)
def _compiled(model: Any) -> Any:
    import jax

    return jax.jit(functools.partial(model.apply, fuse=False))


def frequencies(streams: Batches) -> dict[str, float]:
    """What each loss would be of a model that knows how frequent every label is, and nothing of the example."""
    found = {}
    for stream, patches, words in (("pairs", "mmm_image", "mmm_text"), ("images", "mim", ""), ("text", "", "mlm")):
        batches = streams[stream]
        if patches:
            found[patches] = _entropy([batch["patch_labels"][batch["patch_mask"]] for batch in batches])
        if words:
            labels = [batch["token_labels"] for batch in batches]
            found[words] = _entropy([each[each >= 0] for each in labels])
    return found | {"itm": _entropy([batch["itm_labels"] for batch in streams["pairs"]])}


def _entropy(labels: list[np.ndarray]) -> float:
    shares = np.unique(np.concatenate(labels), return_counts=True)[1] / sum(map(len, labels))
    return float(-(shares * np.log(shares)).sum())


def _batches(settings: Config, processor: Any, specs: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
    """All examples but those that would not fill a batch, of every source."""
    from vlm.experiment import open_data

    sources, _, transform = open_data(settings, processor, specs)
    size, found = settings.data.batch_size, []
    for number, source in enumerate(sources):
        for first in range(0, len(source) - size + 1, size):
            rows = [
                transform(source[index], np.random.default_rng((SEED, number, index)), True)
                for index in range(first, first + size)
            ]
            found.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    return found
