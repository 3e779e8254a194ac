"""Whether the parts of a run fit each other, before it writes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from vlm.data.loader import Loader
from vlm.errors import UserError

if TYPE_CHECKING:
    from vlm.experiment import Experiment

READERS = {
    "model.text": "tokenizer",
    "model.clip_text": "tokenizer",
    "model.decoder": "tokenizer",
    "loss.teacher": "teacher_tokenizer",
}
"""Which of a processor's tokenizers each tower reads."""


def check_vocabularies(processor: Any, model: Any, loss: Any) -> None:
    """Compares a processor's tokenizers with the embeddings that select by their ids: beyond the last row lie NaNs.

    Args:
      model, loss: architecture and loss settings.

    Raises:
      UserError: a tokenizer has more tokens than an embedding has rows.
    """
    sections = {"model": model, "loss": loss}
    for reader, kind in READERS.items():
        section, name = reader.split(".")
        tokens, rows = (
            getattr(part, "vocab_size", None)
            for part in (getattr(processor, kind, None), getattr(sections[section], name, None))
        )
        if tokens is not None and rows is not None and tokens > rows:
            expected = f"expected at least the {tokens} tokens of config.processor.{kind}"
            raise UserError(f"config.{reader}.vocab_size: {expected}, found {rows}")


def check_data(parts: Experiment, state: Any, loader: Loader) -> None:
    """`check_batch` for batches of a loader, of which one row is read."""
    row, size = loader.load_row(*loader.draws(0)[0]).arrays, loader.settings.batch_size
    check_batch(parts, state, {name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for name, x in row.items()})


def check_batch(parts: Experiment, state: Any, batch: Mapping[str, Any]) -> None:
    """Traces the loss for batches of these shapes.

    Args:
      state: a train state, or what has its shapes and dtypes.

    Raises:
      UserError: they do not fit the model or the objective.
    """

    def trace(params: Any, extra: Any, batch: Any) -> Any:
        return parts.loss(params, extra, batch, jax.random.key(0))[0]

    shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in sorted(batch.items()))
    with tracing(f"batches of {shapes} do not fit the model"):
        jax.eval_shape(trace, state.params, state.extra, dict(batch))


@contextlib.contextmanager
def tracing(what: str) -> Iterator[None]:
    """Around a trace: what a model or loss raises about shapes and settings that do not fit becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{what}: {error}") from error
