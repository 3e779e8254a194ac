"""Visual dialog: candidate answers to each question, ranked by a matching head that reads image, caption and dialog.

`details` and metrics follow VisDial v1.0 (Das et al. 2017): MRR, recalls, mean rank, and NDCG where examples have
`relevance`, its dense annotations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm.errors import UserError
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Sampling, Task, first_note
from vlm.evaluation.feed import Advance, Note, pictures_of, trace
from vlm.evaluation.metrics import dialog as metric

KNOWN = ("image", "caption_tokens", "caption_mask")


@dataclasses.dataclass(frozen=True)
class DialogConfig:
    """Settings of one evaluation of visual dialog.

    Attributes:
      data: a source of rounds as `vlm.data.visdial` has them; those without `answer` (test sets) are not scored.
      options_per_step: candidates of a round that are scored side by side; less needs less memory.
      k: recalls are reported at these depths.
      pictures: rounds shown on the HTML page.
    """

    data: dict[str, Any]
    options_per_step: int = 25
    k: tuple[int, ...] = (1, 5, 10)
    language: str = ""
    bootstrap: Sampling = Sampling()
    pictures: int = 48

    def __post_init__(self) -> None:
        if self.options_per_step < 1 or not self.k or min(self.k) < 1:
            raise ValueError("options_per_step, k: expected numbers of at least 1")


@dataclasses.dataclass(frozen=True)
class VisualDialog(Task):
    """A prepared evaluation."""

    config: DialogConfig

    def check(self, embedder: Embedder) -> None:
        """Traces the model on the first readable round; raises UserError where it cannot rank its answers."""
        model = embedder.model
        if not hasattr(model, "encode_dialog") or not hasattr(embedder.processor, "dialog"):
            raise UserError(f"{type(model).__name__}: this model has no visual dialog")
        if (task := embedder.processor.config.task) != "dialog":
            raise UserError(f"expected a processor of task 'dialog', whose rows hold the whole history, found {task!r}")
        example = first_note(self.source, lambda example: {"example": example}).get("example") or self.source[0]
        row = {name: x[None] for name, x in self._inputs(embedder.processor, example).items()}
        known = {name: row[name] for name in KNOWN}
        trace("rank the answers of a dialog", lambda params, row: _match(
            model, params, *_know(model, params, known), row["tokens"], row["mask"]), embedder.params, row)  # fmt: skip

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Ranks the candidates of every round."""
        feed, rows, parts = embedder.feed, [], []
        transform = functools.partial(self._inputs, embedder.processor)
        for fed in feed.examples(self.source, transform, self.note, advance):
            batch = feed.put(fed.local)
            context = _know(embedder.model, embedder.params, {name: batch[name] for name in KNOWN})
            step, count = self.config.options_per_step, batch["tokens"].shape[1]
            found = []
            for start in range(0, count, step):
                start = max(0, min(start, count - step))  # the last part overlaps, so that all have one shape
                part = (batch[name][:, start : start + step] for name in ("tokens", "mask"))
                scores = feed.fetch(_match(embedder.model, embedder.params, *context, *part))
                found.append(np.asarray(scores)[:, len(found) * step - start :])
            rows += fed.notes
            parts.append(np.concatenate(found, axis=1)[fed.valid])
        scores = np.concatenate(parts).astype(np.float64)
        if not np.isfinite(scores).all():
            raise UserError("scores are not finite: has training diverged?")
        return self._result(rows, scores)

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key, image, round, question, candidates, and what is known of the right ones."""
        options, right = example.get("options"), example.get("answer")
        relevance = example.get("relevance")
        where = f"example {example.get('key')!r}"
        if not isinstance(options, (list, tuple)) or not options:
            raise UserError(f"{where}: options: expected candidate answers, found {options!r:.60}")
        if right is not None and (not isinstance(right, int) or not 0 <= right < len(options)):
            raise UserError(f"{where}: answer: expected a place in {len(options)} options, found {right!r:.60}")
        if relevance is not None and (len(relevance) != len(options) or not any(relevance)):
            raise UserError(f"{where}: relevance: expected a number for each of {len(options)} options, some above 0")
        named = {name: example[name] for name in ("image_id", "round") if name in example}
        note = {"key": str(example.get("key")), **named, "question": str(example.get("question"))}
        note |= {"options": list(options), "answer": right}
        return note if relevance is None else note | {"relevance": [float(x) for x in relevance]}

    def _inputs(self, processor: Any, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"image": processor(images=[pictures_of(example)])["image"][0], **processor.dialog(example)}

    def _result(self, rows: list[dict[str, Any]], scores: np.ndarray) -> Result:
        places = metric.places(scores)
        known = np.array([n for n, row in enumerate(rows) if row["answer"] is not None], np.int64)
        right = np.array([rows[n]["answer"] for n in known], np.int64)
        found = metric.right_places(scores[known], right)
        gains = [metric.ndcg(scores[n], np.array(r["relevance"])) for n, r in enumerate(rows) if "relevance" in r]
        metrics = metric.summary(found, self.config.k) if len(known) else {}
        intervals = {}
        if len(known):
            summary = functools.partial(metric.summary, found, self.config.k)
            intervals = self.config.bootstrap.intervals(summary, len(known))
        if gains:
            metrics["ndcg"] = float(np.mean(gains))
        by_row = dict(zip(known.tolist(), found.tolist(), strict=True))
        examples = [
            {name: value for name, value in row.items() if name not in ("options", "relevance")}
            | {"said": row["options"][int(scores[n].argmax())], "rank": by_row.get(n)}
            for n, row in enumerate(rows)
        ]
        cards = [
            {"index": row["index"], "asked": row["question"], "said": said["said"], "correct": said["rank"] == 1}
            | {"wanted": [] if row["answer"] is None else [row["options"][row["answer"]]]}
            for row, said in zip(rows, examples, strict=True)
        ]
        details = {"data_fingerprint": self.source.fingerprint, "language": self.config.language}
        return Result(
            "visual_dialog",
            metrics,
            intervals,
            n=len(rows),
            unreadable=len(self.source) - len(rows),
            details=details | {"options": scores.shape[1], "scored": len(known), "dense": len(gains)},
            examples=examples,
            page={"source": self.source, "cards": cards, "pictures": self.config.pictures},
            official=[
                {"image_id": row.get("image_id"), "round_id": row.get("round"), "ranks": ranks}
                for row, ranks in zip(rows, places.tolist(), strict=True)
            ],
        )


@functools.partial(jax.jit, static_argnums=0)
def _know(model: Any, params: Any, known: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Context [B, M, C] and its mask: the image's tokens and the caption's."""
    return model.apply({"params": params}, *(known[name] for name in KNOWN), method="encode_dialog")


@functools.partial(jax.jit, static_argnums=0)
def _match(model: Any, params: Any, context: jax.Array, seen: jax.Array, tokens: Any, mask: Any) -> jax.Array:
    """Scores [B, A]: how much more each candidate looks right than wrong."""
    logits = model.apply({"params": params}, tokens, mask, context, seen, method="match")
    return jnp.diff(jnp.asarray(logits, jnp.float32), axis=-1)[..., 0]
