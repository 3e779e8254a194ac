"""The HTML page of an evaluation: numbers, pictures with predictions, classes, confusions, retrieval examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.image import decode
from vlm.data.source import Source
from vlm.errors import UserError
from vlm.evaluation import html
from vlm.evaluation.evaluator import Result

MATRIX_CLASSES = 30
TABLE_CLASSES = 200
CONFUSED_PAIRS = 20
SCORES = 3
WANTED = 5
FRAMES = 2
HEADLINES = (
    "top1",
    "top5",
    "mean_average_precision_11",
    "mean_recall",
    "itc/mean_recall",
    "itm/mean_recall",
    "text_to_image_recall@1",
    "image_to_text_recall@1",
    "cider",
    "bleu_4",
    "exact_match",
    "accuracy",
    "consistency",
    "balanced_accuracy",
)


def render(results: Mapping[str, Result], about: Mapping[str, Any]) -> str:
    """The page.

    Args:
      results: by name of the evaluation.
      about: what was evaluated (checkpoint, step, versions, …), folded under the summary.
    """
    place = {kind: number for number, kind in enumerate(SECTIONS)}
    results = dict(sorted(results.items(), key=lambda item: place.get(item[1].kind, len(place))))
    origin = f"<details><summary>How this was made</summary>{html.facts(_origin(about))}</details>"
    parts = [f"<header><h1>{html.text('Evaluation')}</h1>", _summary(results), origin, "</header>"]
    for number, (name, result) in enumerate(results.items()):
        language = str(result.details.get("language", ""))
        parts.append(f'<section id="e{number}"><h2>{html.text(name)}</h2>')
        parts.append(f'<p class="soft">{_sentence(result)}</p>')
        if result.kind != "embeddings":
            cards = (
                html.figure(_words(key), value, result.intervals.get(key)) for key, value in result.metrics.items()
            )
            parts.append(f'<div class="figures">{"".join(cards)}</div>')
        parts.append(SECTIONS.get(result.kind, _no_section)(result, language))
        parts.append("</section>")
    return html.page("Evaluation", "\n".join(parts))


def _origin(about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Plain values as they are; of the environment what a reader asks for first."""
    values = [(_words(key), value) for key, value in about.items() if not isinstance(value, Mapping)]
    environment = about.get("environment", {})
    for key in ("time", "git", "devices", "command"):
        value = environment.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{count} × {name}" for name, count in value.items())
        values.append((key, " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value))
    return values


def _summary(results: Mapping[str, Result]) -> str:
    rows = []
    for number, (name, result) in enumerate(results.items()):
        shown = _headline(result)
        language = html.text(result.details.get("language", ""))
        link = f'<a href="#e{number}">{html.text(name)}</a>'
        rows.append([link, html.text(_words(result.kind)), language, f"{result.n:,}", html.text(shown)])
    return "<h3>Summary</h3>" + html.table(["evaluation", "kind", "language", "examples", "result"], rows, [3])


def _headline(result: Result) -> str:
    """The numbers that are quoted first."""
    if result.kind == "embeddings":
        return " · ".join(f"{value:,.0f} {key}" for key, value in result.metrics.items())
    first = [key for key in HEADLINES if key in result.metrics]
    return " · ".join(f"{_words(key)} {html.number(result.metrics[key], key)}" for key in first[:3])


def _sentence(result: Result) -> str:
    parts = [f"{result.n:,} examples"]
    if result.unreadable:
        parts.append(f"{result.unreadable:,} more could not be read and do not count")
    if "chance" in result.details:
        parts.append(f"{result.details['classes']:,} classes (chance {html.number(result.details['chance'])})")
        parts.append(f"{result.details['templates']:,} templates")
    if "texts" in result.details:
        parts.append(f"{result.details['texts']:,} texts")
    return " · ".join(parts)


def _no_section(result: Result, language: str) -> str:
    return html.facts(
        (_words(key), value) for key, value in result.details.items() if not isinstance(value, (dict, list))
    )


# --------------------------------------------------------------------------------------------------- classification


def _zero_shot(result: Result, language: str) -> str:
    show = result.page
    parts = ['<h3>Predictions <span class="soft">(at most half of them wrong ones)</span></h3>', '<div class="grid">']
    for example in _mixed(result.examples, show["pictures"]):
        parts.append(_prediction(example, show["names"], _thumbnail(show["source"], example["index"]), language))
    confusion = f"<div>{_confusion(show, language)}</div>" if "confusion" in show else ""
    parts.append(f'</div><div class="side"><div>{_class_table(show, language)}</div>{confusion}</div>')
    return "".join(parts)


def _mixed(examples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Evenly spaced examples, at most half of them wrong ones, in their order."""
    wrong = [example for example in examples if not example["correct"]]
    right = [example for example in examples if example["correct"]]
    few = _spread(wrong, max(count // 2, count - len(right)))
    chosen = few + _spread(right, count - len(few))
    return sorted(chosen, key=lambda example: (example["correct"], example["index"]))


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    if count <= 0 or not items:
        return []
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]


def _prediction(example: Mapping[str, Any], names: Sequence[str], image: Image.Image | None, language: str) -> str:
    labels = example["label"] if isinstance(example["label"], list) else [example["label"]]
    kind, sign = ("good", "✓") if example["correct"] else ("bad", "✗")
    bars = "".join(
        f'<div class="bar"><span>{html.text(names[number], language)}</span><span>{score:.3f}</span></div>'
        for number, score in example["top"][:SCORES]
    )
    truth = ", ".join(html.text(names[number], language) for number in labels)
    return (
        f'<div class="card {kind}">{html.picture(image)}<div class="mark {kind}">{sign} '
        f"<b>{html.text(names[example['prediction']], language)}</b></div>"
        f'<div class="soft">is {truth}</div>{bars}</div>'
    )


def _class_table(show: Mapping[str, Any], language: str) -> str:
    recall, count, columns = show["recall"], show["count"], show["columns"]
    order = sorted(
        range(len(columns)), key=lambda c: (np.isnan(recall[c]), recall[c] if recall[c] == recall[c] else 0, c)
    )
    rows = []
    for column in order[:TABLE_CLASSES]:
        name = html.text(show["names"][columns[column]], language)
        rows.append([str(columns[column]), name, f"{count[column]:,}", html.number(recall[column])])
    kind = "recall" if "confusion" in show else "average precision"
    note = f" (the {TABLE_CLASSES} worst of {len(columns)})" if len(columns) > TABLE_CLASSES else ""
    return f"<h3>Classes, worst first{note}</h3>" + html.table(["number", "class", "examples", kind], rows, [0, 2, 3])


def _confusion(show: Mapping[str, Any], language: str) -> str:
    matrix, columns = show["confusion"], show["columns"]
    names = [show["names"][number] for number in columns]
    if len(columns) > MATRIX_CLASSES:
        wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
        worst = [i for i in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED_PAIRS] if wrong.flat[i]]
        pairs = [divmod(int(i), len(matrix)) for i in worst]
        rows = [[html.text(names[a], language), html.text(names[b], language), f"{wrong[a, b]:,}"] for a, b in pairs]
        return "<h3>Most confused</h3>" + html.table(["is", "predicted", "times"], rows, [2])
    head = "".join(f"<th>{html.text(name, language)}</th>" for name in names)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    body = "".join(
        f"<tr><th>{html.text(name, language)}</th>"
        + "".join(
            _cell(int(matrix[row, column]), float(share[row, column]), row == column) for column in range(len(names))
        )
        + "</tr>"
        for row, name in enumerate(names)
    )
    caption = '<p class="soft">Rows: what it is. Columns: what was predicted.</p>'
    matrix_table = f'<table class="matrix"><tr><th></th>{head}</tr>{body}</table>'
    return f'<h3>Confusions</h3>{caption}<div class="scroll">{matrix_table}</div>'


def _cell(count: int, share: float, right: bool) -> str:
    if not count:
        return '<td class="zero">0</td>'
    colour = "18,128,92" if right else "196,50,10"
    return f'<td style="background:rgba({colour},{0.12 + 0.6 * share:.2f})">{count}</td>'


# -------------------------------------------------------------------------------------------------------- retrieval


def _retrieval(result: Result, language: str) -> str:
    source, queries = result.page["source"], result.page["queries"]
    parts = ["<h3>Texts found for images</h3>"]
    for query in queries["image_to_text"]:
        items = "".join(_answer(answer, language) for answer in query["answers"])
        image = _pictures(source, query["index"])
        rank = f'<div class="soft">first right text: {query["rank"]}.</div>'
        parts.append(f'<div class="query"><div>{image}{rank}</div><ol>{items}</ol></div>')
    parts.append("<h3>Images found for texts</h3>")
    for query in queries["text_to_image"]:
        cards = "".join(
            f'<div class="card {"good" if right else ""}">{_pictures(source, index)}'
            f'<span class="mark">{score:.3f}{" ✓" if right else ""}</span></div>'
            for index, score, right in query["answers"]
        )
        words = f"<div><b>{html.text(query['text'], language)}</b>"
        rank = f'<div class="soft">right image: {query["rank"]}.</div></div>'
        parts.append(f'<div class="query">{words}{rank}<div class="row">{cards}</div></div>')
    return "".join(parts)


def _answer(answer: tuple[str, float, bool], language: str) -> str:
    words, score, right = answer
    kind, sign = ("good", " ✓") if right else ("", "")
    said = f'<span class="mark">{html.text(words, language)}{sign}</span>'
    return f'<li class="{kind}">{said} <span class="soft">{score:.3f}</span></li>'


# ------------------------------------------------------------------------------------------------------------ texts


def _texts(result: Result, language: str) -> str:
    """Cards with pictures, what was asked, what was said and what people say."""
    show = result.page
    judged = any(card["correct"] is not None for card in show["cards"])
    cards = [card | {"correct": bool(card["correct"])} for card in show["cards"]]
    note = "at most half of them wrong ones" if judged else "not judged"
    note = f"{note}; bold: the model's words, below: people's" if any(card["wanted"] for card in cards) else note
    parts = [f'<h3>Predictions <span class="soft">({note})</span></h3>', '<div class="grid">']
    for card in _mixed(cards, show["pictures"]):
        kind, sign = (("good", "✓ ") if card["correct"] else ("bad", "✗ ")) if judged else ("", "")
        asked = f"<div>{html.text(card['asked'], language)}</div>" if card.get("asked") else ""
        wanted = "; ".join(html.text(text, language) for text in card["wanted"][:WANTED])
        parts.append(
            f'<div class="card {kind}">{_pictures(show["source"], card["index"])}{asked}'
            f'<div class="mark {kind}">{sign}<b>{html.text(card["said"], language)}</b></div>'
            f'<div class="soft">{wanted}</div></div>'
        )
    return "".join(parts) + "</div>"


def _pictures(source: Source, index: int) -> str:
    """The picture of an example, or the first few of them; nothing for an example that is text alone."""
    try:
        example = source[index]
        if example.get("image") is None:
            return ""
        data = example["image"]
        several = list(data)[:FRAMES] if isinstance(data, (list, tuple)) else [data]
        return "".join(html.picture(decode(item)) for item in several)
    except (UserError, KeyError):
        return html.picture(None)


def _thumbnail(source: Source, index: int) -> Image.Image | None:
    try:
        return decode(source[index]["image"])
    except (UserError, KeyError):
        return None


def _words(name: str) -> str:
    return name.replace("_", " ").replace("@", " at ")


SECTIONS: dict[str, Callable[[Result, str], str]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "matching_retrieval": _retrieval,
    "captions": _texts,
    "vqa": _texts,
    "nlvr2": _texts,
    "classification": _texts,
}
