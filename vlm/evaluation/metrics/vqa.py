"""VQA accuracy (Antol et al. 2015; Goyal et al. 2017), digit for digit as the official evaluation computes it.

An answer is compared with each annotator's *other* answers: min(1, equal ones / 3), averaged over the annotators. The
official code has peculiarities that are part of every published number; they are kept, and where a choice exists the
mode has a name that is reported with the number:

* Published evaluators differ in when they normalise answers: `always`, or only where the annotators disagree
  (`disagreement`), so that "Black." is wrong where all say "black". LAVIS' (`punctuation`) always normalises the answer
  that is judged, but of the annotators' only the punctuation, where they disagree: "two" is wrong where all say "two".
* "Other" answers are those whose whole record differs. Where annotations carry no `answer_id`, as VizWiz's, equal
  answers are taken for one and the same (`as_is`); `distinct` tells annotators apart by their position.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vlm.errors import UserError

Normalise = Literal["always", "disagreement", "punctuation"]
AnswerIds = Literal["as_is", "distinct"]
NORMALISE: tuple[Normalise, ...] = ("always", "disagreement", "punctuation")
ANSWER_IDS: tuple[AnswerIds, ...] = ("as_is", "distinct")
DIGITS = 4  # of a percentage, as rounded by the official tool

_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
_MORE_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""


def _contractions() -> dict[str, str]:
    """Every way to write a contraction with exactly one apostrophe missing."""
    found = {}
    for word in f"{_ONE_APOSTROPHE} {_MORE_APOSTROPHES}".split():
        for place, character in enumerate(word):
            if character == "'":
                found[word[:place] + word[place + 1 :]] = word
    return found | {"somebody'd": "somebodyd"}  # the official table's slip


CONTRACTIONS = _contractions()
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
# Meant to keep periods between digits; as written it keeps those before a digit.
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # a flag that the official code passes where the number of replacements goes


@dataclasses.dataclass(frozen=True)
class VqaScores:
    """Accuracies in percent, rounded as the official tool does.

    Attributes:
      accuracy: mean over the questions.
      per_question: accuracy of every question.
      per_answer_type: means; without types in the annotations, all are "other".
      per_question_type: means; empty without types in the annotations.
    """

    accuracy: float
    per_question: dict[Any, float]
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]


@functools.lru_cache(maxsize=1 << 18)
def normalise(answer: str) -> str:
    """An answer as it is compared: punctuation, case, number words, articles, contractions."""
    words = [NUMBERS.get(word, word) for word in punctuate(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def punctuate(answer: str) -> str:
    """The part of `normalise` that is about punctuation."""
    drop = _COMMA.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        if mark in answer:
            text = text.replace(mark, "" if drop or f"{mark} " in answer or f" {mark}" in answer else " ")
    return _PERIOD.sub("", text, count=_MOST_PERIODS)


def accuracy(
    answer: str,
    annotated: Sequence[Mapping[str, Any]],
    *,
    normalise_answers: Normalise = "always",
    answer_ids: AnswerIds = "as_is",
) -> float:
    """Accuracy of one answer, 0 … 1.

    Args:
      annotated: the annotators' records, `{"answer": …, "answer_id": …, …}`.
      normalise_answers, answer_ids: see the module.
    """
    texts, answer = [record["answer"] for record in annotated], _clean(answer)
    if normalise_answers == "punctuation":
        texts, answer = [punctuate(text) for text in texts] if len(set(texts)) > 1 else texts, normalise(answer)
    else:
        texts = [_clean(text) for text in texts]
        if normalise_answers == "always" or len(set(texts)) > 1:
            texts, answer = [normalise(text) for text in texts], normalise(answer)
    matches = texts.count(answer)
    if answer_ids == "distinct" or _told_apart(annotated):
        same = [1] * len(texts)
    else:
        keys = [
            json.dumps(record | {"answer": text}, sort_keys=True)
            for record, text in zip(map(dict, annotated), texts, strict=True)
        ]
        counts = Counter(keys)
        same = [counts[key] for key in keys]
    shares = [min(1, float(matches - (n if text == answer else 0)) / 3) for text, n in zip(texts, same, strict=True)]
    return float(sum(shares)) / len(shares)


def score(
    answers: Mapping[Any, str],
    annotations: Mapping[Any, Mapping[str, Any]],
    *,
    normalise_answers: Normalise = "always",
    answer_ids: AnswerIds = "as_is",
) -> VqaScores:
    """Accuracy over the questions in `answers`, in the order of the annotations.

    Args:
      answers: {question id: answer}.
      annotations: {question id: record of the official annotation file}.

    Raises:
      UserError: nothing to score, or an answer to a question that has no annotation.
    """
    unknown = [question for question in answers if question not in annotations]
    if unknown or not answers:
        raise UserError(
            f"answers: question {unknown[0]!r} has no annotation" if unknown else "answers: nothing to score"
        )
    each = {
        question: accuracy(
            answers[question], record["answers"], normalise_answers=normalise_answers, answer_ids=answer_ids
        )
        for question, record in annotations.items()
        if question in answers
    }
    return VqaScores(
        _percent(list(each.values())),
        {question: round(100 * value, DIGITS) for question, value in each.items()},
        _by_type(each, annotations, "answer_type", "other"),
        _by_type(each, annotations, "question_type", None),
    )


def ids_matter(annotations: Mapping[Any, Mapping[str, Any]]) -> bool:
    """Whether the annotations lack `answer_id`s, so that the two modes of counting annotators differ."""
    return any(not _told_apart(record["answers"]) for record in annotations.values())


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _told_apart(annotated: Sequence[Mapping[str, Any]]) -> bool:
    ids = [record.get("answer_id") for record in annotated]
    return None not in ids and len(set(ids)) == len(ids)


def _percent(values: Sequence[float]) -> float:
    return round(100 * float(sum(values)) / len(values), DIGITS)


def _by_type(
    each: Mapping[Any, float],
    annotations: Mapping[Any, Mapping[str, Any]],
    field: str,
    default: str | None,
) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for question, value in each.items():
        name = annotations[question].get(field, default)
        if name is not None:
            groups.setdefault(str(name), []).append(value)
    return {name: _percent(values) for name, values in sorted(groups.items())}
