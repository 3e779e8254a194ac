"""Whether the parts of a run fit each other, before it writes anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from vlm.data.loader import Loader
from vlm.errors import UserError
from vlm.tree import flatten, listing, unflatten

if TYPE_CHECKING:
    from vlm.experiment import Experiment

READERS = {
    "model.text": "tokenizer",
    "model.clip_text": "tokenizer",
    "model.decoder": "tokenizer",
    "loss.teacher": "teacher_tokenizer",
}
"""Which of a processor's tokenizers each tower reads."""
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat", "remat2")
"""Equations that run a program of their own once, whose inputs and outputs are theirs."""


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


def check_tokenizer(folder: Any, tokens: int, model: Any) -> None:
    """Compares the tokenizer in a folder with the embeddings of an architecture: beyond their last row lie NaNs.

    Raises:
      UserError: it has more tokens than one of them has rows.
    """
    for reader in READERS:
        rows = getattr(getattr(model, reader.removeprefix("model."), None), "vocab_size", None)
        if rows is not None and tokens > rows:
            raise UserError(f"{folder}: expected a tokenizer of at most the model's {rows} tokens, found {tokens}")


def check_data(parts: Experiment, state: Any, loader: Loader) -> None:
    """`check_batch` for batches of a loader, of which one row is read."""
    row, size = loader.load_row(*loader.draws(0)[0]).arrays, loader.settings.batch_size
    check_batch(parts, state, {name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for name, x in row.items()})


def check_batch(parts: Experiment, state: Any, batch: Mapping[str, Any]) -> None:
    """Traces the loss for batches of these shapes.

    Args:
      state: a train state, or what has its shapes and dtypes.

    Raises:
      UserError: they do not fit the model or the objective; or weight decay alone would change a parameter, because
        the loss does not read it (where there are streams, another one's may).
    """

    def trace(params: Any, extra: Any, batch: Any) -> Any:
        return parts.loss(unflatten(params), extra, batch, jax.random.key(0))[0]

    shapes = ", ".join(f"{name}{list(array.shape)}" for name, array in sorted(batch.items()))
    params = flatten(state.params)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state.extra, dict(batch)))
    with tracing(f"batches of {shapes} do not fit the model"):
        program = jax.make_jaxpr(trace)(*arguments).jaxpr
    if not parts.alike:
        return
    reached = dict(zip(sorted(params), reaches(program, [True]), strict=False))  # the first inputs, as jax sorts them
    groups, decay = parts.optimizer.groups, parts.optimizer.decay
    moved = [path for path, group in groups.items() if not group.freeze and group.lr_multiplier and decay[path]]
    if loose := [path for path in moved if not reached[path]]:
        told = f"{listing(loose, 4)}, so that weight decay alone would change it"
        what = "freeze it, or give it weight_decay 0, with which old checkpoints go on"
        raise UserError(f"config.optimizer.groups: the objective gives no gradient to {told}: {what}")


def reaches(program: Any, wanted: Sequence[bool]) -> list[bool]:
    """Which inputs of a jaxpr may have a gradient from those of its outputs that are wanted.

    Exact through calls, and on the safe side elsewhere: a scan of which something is wanted may reach all that its body
    reads, another equation all of its inputs. What is no real number carries no gradient, and nothing passes
    `stop_gradient`.
    """
    live = {var for var, on in zip(program.outvars, wanted, strict=True) if on and not isinstance(var, Literal)}
    for equation in reversed(program.eqns):
        asked = [var in live for var in equation.outvars]
        if any(asked) or equation.effects:
            pairs = zip(equation.invars, _inputs(equation, asked), strict=True)
            live |= {var for var, on in pairs if on and not isinstance(var, Literal) and _real(var.aval)}
    return [var in live for var in program.invars]


def _inputs(equation: Any, asked: list[bool]) -> list[bool]:
    """`reaches` of one equation. A `custom_vjp` is not looked into: what its rule reads is not in its program."""
    name, params = equation.primitive.name, equation.params
    body = params.get("jaxpr")
    body = getattr(body, "jaxpr", body)
    if name == "stop_gradient":
        return [False] * len(equation.invars)
    if equation.effects or len(getattr(body, "invars", ())) != len(equation.invars):
        return [True] * len(equation.invars)
    if name == "scan":  # what a step hands on may be of use in a later one
        return reaches(body, [True] * len(body.outvars))
    return reaches(body, asked) if name in CALLS else [True] * len(equation.invars)


def _real(aval: Any) -> bool:
    return jnp.issubdtype(getattr(aval, "dtype", np.float32), np.inexact)


@contextlib.contextmanager
def tracing(what: str) -> Iterator[None]:
    """Around a trace: what a model or loss raises about shapes and settings that do not fit becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{what}: {error}") from error
