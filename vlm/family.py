"""The contract between a model family and everything that trains, evaluates, converts and loads models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from vlm.layers.cache import DecoderCache

NO_PROCESSOR = "has no tokenizer and image settings (python -m vlm.convert SOURCE TARGET --tokenizer=FOLDER adds them)"
"""What is said of a checkpoint that has weights only."""
Params = Any
Extra = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
COUNT = "count/"
"""What a metric of evaluation begins with that says how many things another one is a mean over."""


class Loss(Protocol):
    """The objective of a training step, a pure function."""

    def __call__(
        self, model: Any, params: Params, extra: Extra, batch: Batch, rng: jax.Array, config: Any
    ) -> tuple[jax.Array, tuple[Metrics, Extra]]:
        """Returns the scalar to minimise, its terms for the log, and the next `extra`.

        Args:
          model: the family's module; params: its parameters; extra: other state (teacher, queue).
          batch: arrays as the processor makes them, on the mesh; rng: key of this step; config: the loss settings.
            A batch with `valid` bool[B] is one of evaluation, which a family may offer: nothing is random, rows that
            are not valid count nowhere, and beside each mean NAME there is "count/NAME".
        """
        ...


class Generative(Protocol):
    """A model that writes text, as `vlm.generation` drives it: a Linen module with these attributes and methods.

    It has a boolean attribute `decoding`: true where its parameters are laid out for decoding
    (`layers.layout.decoding_layout`). `prefill` and `decode` are called that way only, through `apply`.

    Attributes:
      decoding_parts: path of each subtree that decodes, with the width of its attention heads.
      vocab_size: width V of the logits; context_length: the longest sequence, None if nothing limits it.
      stop_ids, pad_id: what ends a sequence unless told otherwise, and what fills up after it.
    """

    decoding: bool
    decoding_parts: Mapping[str, int]
    vocab_size: int
    context_length: int | None
    stop_ids: tuple[int, ...]
    pad_id: int

    def prompt(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `prefill` for a processor's batch, NumPy arrays in and out, not through `apply`.

        `tokens` int32[B, L] and `mask` bool[B, L] are what the decoder reads first, padded on either side. Integer and
        boolean arrays [B, L, …] may be padded further on the right, with zeros.
        """
        ...

    def prefill(self, **batch: jax.Array) -> tuple[jax.Array, DecoderCache]:
        """Logits [B, V] after each row's last real token, and the cache of the prompt."""
        ...

    def decode(self, tokens: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """One step: tokens int32[B, n] of the n rows of each example to logits [B, n, V] and the next cache."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
      name: its key in `vlm.models.FAMILIES`, and `config.family`.
      config_type: frozen dataclass of the architecture; `config.model` is built into it.
      module: makes the Linen module from that config.
      loss_type: frozen dataclass of the loss settings; `config.loss` is built into it.
      loss: the objective.
      init_extra: (module, parameters, rng, loss settings) -> extra state at step 0, a traceable function; {} where
        there is none. It gets the parameters that a run starts from, so that a teacher can be their copy: boxed with
        their logical axes where only the layout is asked for. `layers.linear.partitioned` names the axes of new arrays.
      example: (architecture) -> one abstract batch of size 1 that reaches every parameter: the arguments of `init`.
      processor_type: frozen dataclass of the processor's settings; `config.processor` is built into it. It may have
        `check(architecture, loss settings)`, which raises UserError where its examples would not fit them, and
        `for_run(architecture, loss settings)`, which gives the settings completed from them.
      processor: the class that turns images and texts into batches and has `from_config(settings)`, `save(dir)`,
        `load(dir, architecture, tokenizer_dir)`: the architecture tells what the files do not (the size of pictures),
        and the other folder, if any, has the tokenizer; `example(raw, rng, train)` for one training example, and
        `rows(settings)`, its possible shapes; if examples are of several kinds,
        `rows(settings, fields)`: of raw examples with these fields only.
      weights: the module with the family's tables for foreign checkpoints.
    """

    name: str
    config_type: type
    module: Callable[[Any], Any]
    loss_type: type
    loss: Loss
    init_extra: Callable[[Any, Params, jax.Array, Any], Extra]
    example: Callable[[Any], dict[str, Any]]
    processor_type: type
    processor: Any
    weights: Any
