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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Batches of held-out examples as the training of a run makes them, always the same.

    Attributes:
      settings: of the run. parts: its model and loss (`vlm.experiment.Experiment`).
      processor: makes batches, and loads texts.
      batches: of each stream.
    """

    settings: Config
    parts: Any
    processor: Any
    batches: dict[str, list[dict[str, np.ndarray]]]

    @classmethod
    def of(cls, workdir: Path, sources: Mapping[str, Sequence[Mapping[str, Any]]]) -> HeldOut:
        """Reads a training workdir's configuration and the held-out sources of each stream.

        Raises:
          UserError: data that cannot be opened, or examples that training could not use either.
        """
        from vlm.experiment import experiment, make_processor

        settings = build(Config, parse_config_flag(str(workdir / "config.json")), "")
        parts = experiment(settings)
        processor = make_processor(settings, parts.family)
        batches = {stream: _batches(settings, processor, specs) for stream, specs in sources.items()}
        return cls(settings, parts, processor, batches)

    def random(self) -> Any:
        """The parameters that the run started from."""
        import jax

        from vlm.sharding import unbox

        return jax.jit(lambda: unbox(self.parts.init.params(self.settings.train.seed)))()

    def losses(self, params: Any) -> dict[str, float]:
        """Every loss and accuracy of training, averaged over the batches."""
        import jax

        loss = jax.jit(self.parts.loss)
        values: dict[str, list[float]] = {}
        for batches in self.batches.values():
            for batch in batches:
                _, (metrics, _) = loss(params, {}, batch, jax.random.key(0))
                for name, value in metrics.items():
                    values.setdefault(name, []).append(float(value))
        return {name: float(np.mean(each)) for name, each in values.items()}

    def frequencies(self) -> dict[str, float]:
        """What each loss would be of a model that knows how frequent every label is, and nothing of the example."""
        found = {}
        for stream, patches, words in (("pairs", "mmm_image", "mmm_text"), ("images", "mim", ""), ("text", "", "mlm")):
            batches = self.batches[stream]
            if patches:
                found[patches] = _entropy([batch["patch_labels"][batch["patch_mask"]] for batch in batches])
            if words:
                labels = [batch["token_labels"] for batch in batches]
                found[words] = _entropy([each[each >= 0] for each in labels])
        return found | {"itm": _entropy([batch["itm_labels"] for batch in self.batches["pairs"]])}

    def predictions(self, params: Any, stream: str) -> dict[str, np.ndarray]:
        """The likeliest visual word of every patch int[B, P], and for pairs the likeliest token int[B, L].

        Of the first batch of "pairs" or "images", with its patches and tokens hidden.
        """
        import jax

        names = ("image", "tokens", "mask", "patch_mask", "masked_tokens")
        batch = {name: self.batches[stream][0][name] for name in names if name in self.batches[stream][0]}
        output = jax.jit(functools.partial(self.parts.model.apply, fuse=False))({"params": params}, **batch)
        if stream == "images":
            return {"patches": np.asarray(output.mim_logits[:, 1:].argmax(-1))}
        found = {"patches": output.mmm_image_logits, "tokens": output.mmm_text_logits}
        return {name: np.asarray(logits.argmax(-1)) for name, logits in found.items()}


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
