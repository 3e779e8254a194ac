"""Visual question answering: answers written freely, chosen from a list or classes, with the official accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlm.data.annotations import read_answer_list
from vlm.errors import UserError
from vlm.evaluation.answers import Ranker
from vlm.evaluation.captions import pixels
from vlm.evaluation.classify import check_classifies, classify
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Sampling, Task, field
from vlm.evaluation.feed import Advance, Note
from vlm.evaluation.heads import head_inputs
from vlm.evaluation.image_text import texts_of
from vlm.evaluation.metrics import vqa as metric
from vlm.evaluation.metrics.files import answer_records
from vlm.evaluation.writing import Writer, check_writes, generation_config, question_rows
from vlm.generation import GenerationConfig


@dataclasses.dataclass(frozen=True)
class VqaConfig:
    """Settings of one question-answering evaluation.

    Attributes:
      data: a source whose examples have an image, a question and, to be scored, people's answers.
      question, answers, question_id: the fields; `answers` None: answers are given and not scored (test sets). Where
        examples have no `question_id` it is their position. People's answers are strings, or their official records,
        which are taken from "answers" where an example has them there.
      mode: "generate", "rank" the answers of a list, or "classify": each output of the classifier is an answer.
      answer_list: a file with a JSON list of different answers, or the answers, to rank, or of the outputs; None with
        "classify": those of the processor.
      shortlist: how many answers, those with the most probable first token, are ranked whole (published: 128).
      label_smoothing: of the loss that ranks (published: 0.1).
      chunk: candidates of a question that run side by side; less needs less memory.
      generation: fields of `GenerationConfig` in place of the published ones (3 beams, at most 10 tokens).
      normalise_answers, answer_ids: see `vlm.evaluation.metrics.vqa`.
      types: a field ("answer_type") by which accuracy is given as well.
      pictures: examples shown on the HTML page.
    """

    data: dict[str, Any]
    question: str = "question"
    answers: str | None = "answer"
    question_id: str = "question_id"
    mode: Literal["generate", "rank", "classify"] = "generate"
    answer_list: str | tuple[str, ...] | None = None
    shortlist: int = 128
    label_smoothing: float = 0.1
    chunk: int = 32
    preset: Literal["vqa", "greedy"] = "vqa"
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    normalise_answers: metric.Normalise = "always"
    answer_ids: metric.AnswerIds = "as_is"
    types: str | None = None
    language: str = ""
    bootstrap: Sampling = Sampling()
    pictures: int = 48

    def __post_init__(self) -> None:
        if self.mode != "classify" and (self.mode == "rank") != (self.answer_list is not None):
            raise ValueError(f"answer_list: expected one with mode='rank' only, found mode={self.mode!r}")
        if self.mode != "generate" and self.generation:
            raise ValueError(f"generation: expected none with mode={self.mode!r}")
        if self.shortlist < 1 or self.chunk < 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError("expected shortlist and chunk of at least 1 and label_smoothing in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Vqa(Task):
    """A prepared question-answering evaluation."""

    config: VqaConfig
    generation: GenerationConfig
    candidates: list[str]

    @classmethod
    def prepare(cls, config: VqaConfig, path: str, limit: int | None = None) -> Vqa:
        """Opens the data, looks at its first question and reads the list of answers.

        Raises:
          UserError: one of them is wrong.
        """
        generation = generation_config(config.preset, config.generation, f"{path}.generation")
        given = config.answer_list
        if isinstance(given, str) and not Path(given).is_file():
            raise UserError(f"{path}.answer_list: no such file: {given}")
        candidates = read_answer_list(given) if isinstance(given, str) else list(given or ())
        if len(set(candidates)) < len(candidates) or (config.mode == "rank" and not all(map(str.strip, candidates))):
            raise UserError(f"{path}.answer_list: expected different answers, none of them empty")
        return cls._open(config, path, limit, generation, candidates)

    def check(self, embedder: Embedder) -> None:
        """Traces the model; raises UserError where it cannot answer."""
        if self.config.mode == "classify":
            count, answers = check_classifies(embedder, self.source, self._inputs), self._answers(embedder.processor)
            if count != len(answers):
                raise UserError(f"the model has {count} outputs, and the list {len(answers)} answers")
            return
        check_writes(embedder, embedder.processor(texts=["a"]), answers=True)

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Answers every question."""
        if self.config.mode == "classify":
            return self._result(self._classified(embedder, advance))
        config, feed, processor = self.config, embedder.feed, embedder.processor
        writer = ranker = None
        if config.mode == "rank":
            settings = {"shortlist": config.shortlist, "label_smoothing": config.label_smoothing}
            ranker = Ranker.of(embedder, self.candidates, chunk=config.chunk, **settings)
        else:
            writer = Writer.of(embedder, self.generation)
        rows: list[dict[str, Any]] = []
        for fed in feed.examples(self.source, lambda e: pixels(processor, e), self.note, advance):
            if not fed.notes:
                continue
            questions = question_rows(processor, [note["question"] for note in fed.notes], fed.valid, feed.rows)
            batch = feed.put(fed.local) | questions
            if ranker is None:
                assert writer is not None
                texts = writer(batch)
                found = [{"answer": texts[row]} for row in fed.valid]
            else:
                ranked = ranker(feed, batch)
                least = ranked.losses.min(axis=1)
                found = [{"answer": self.candidates[ranked.best[r]], "loss": float(least[r])} for r in fed.valid]
            rows += [note | answer for note, answer in zip(fed.notes, found, strict=True)]
        return self._result(rows)

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key, id, question and people's answers of an example."""
        config = self.config
        question = texts_of(example, config.question)[0]
        note: Note = {"key": str(example.get("key")), "question": question}
        if example.get(config.question_id) is not None:
            value = example[config.question_id]
            note["question_id"] = value if isinstance(value, str) else int(value)
        if config.types is not None:
            note["type"] = str(field(example, config.types))
        return note if config.answers is None else note | {"answers": _answers(example, config.answers)}

    def _classified(self, embedder: Embedder, advance: Advance | None) -> list[dict[str, Any]]:
        answers = self._answers(embedder.processor)
        notes, scores = classify(embedder, self.source, self._inputs, self.note, advance)
        chosen = zip(notes, scores.argmax(axis=1), scores.max(axis=1), strict=True)
        return [note | {"answer": answers[best], "score": round(float(score), 6)} for note, best, score in chosen]

    def _answers(self, processor: Any) -> list[str]:
        answers = self.candidates or list(getattr(processor, "answers", None) or ())
        if not answers:
            raise UserError("answer_list: expected one; the checkpoint's processor has none")
        return answers

    def _inputs(self, processor: Any, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return head_inputs(processor, example, self.config.question)

    def _result(self, rows: list[dict[str, Any]]) -> Result:
        config = self.config
        rows = [{"question_id": row.get("question_id", row["index"]), **row} for row in rows]
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        if config.answers is not None:
            metrics, intervals = self._score(rows)
        details: dict[str, Any] = {
            "data_fingerprint": self.source.fingerprint,
            "language": config.language,
            "mode": config.mode,
            "answer_ids": config.answer_ids,
            "normalise": config.normalise_answers,
        }
        if config.mode == "rank":
            details |= {"candidates": len(self.candidates), "shortlist": min(config.shortlist, len(self.candidates))}
        elif config.mode == "generate":
            details["generation"] = dataclasses.asdict(self.generation)
        cards = [
            {"index": row["index"], "asked": row["question"], "said": row["answer"], "correct": row.get("correct")}
            | {"wanted": list(dict.fromkeys(person["answer"] for person in _people(row)))}
            for row in rows
        ]
        return Result(
            "vqa",
            metrics,
            intervals,
            n=len(rows),
            unreadable=len(self.source) - len(rows),
            details=details,
            examples=rows,
            page={"source": self.source, "cards": cards, "pictures": config.pictures},
            official=[{"question_id": row["question_id"], "answer": row["answer"]} for row in rows],
        )

    def _score(self, rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Adds each question's accuracy to its row; returns the mean, overall and by type, as shares."""
        modes: dict[str, Any] = {
            "normalise_answers": self.config.normalise_answers,
            "answer_ids": self.config.answer_ids,
        }
        for row in rows:
            row["accuracy"] = metric.accuracy(row["answer"], _people(row), **modes)
            row["correct"] = row["accuracy"] > 0
        values = np.array([row["accuracy"] for row in rows])
        metrics = {"accuracy": float(values.mean())}
        if self.config.types is not None:
            for name in sorted({row["type"] for row in rows}):
                metrics[f"{name}/accuracy"] = float(np.mean([r["accuracy"] for r in rows if r["type"] == name]))
        bootstrap = self.config.bootstrap
        return metrics, bootstrap.intervals(
            lambda counts: {"accuracy": float(np.average(values, weights=counts))}, len(values)
        )


def _answers(example: Mapping[str, Any], name: str) -> list[Any]:
    """People's answers: strings, or the official records."""
    given = field(example, name), example.get("answers")
    value = next((v for v in given[::-1] if isinstance(v, list) and v and isinstance(v[0], Mapping)), None)
    return texts_of(example, name) if value is None else answer_records(value, f"example {example.get('key')!r}")


def _people(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = answer_records(row["answers"], f"example {row['key']!r}") if "answers" in row else []
    if len(found) == 1:  # the metric asks for three others who agree; one who answers alone is right
        return [found[0] | {"answer_id": number} for number in range(4)]
    return found
