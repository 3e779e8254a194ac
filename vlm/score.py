"""Scores result files in the official formats, with the official numbers.

    python -m vlm.score captions  --results=R.json --annotations=captions_val2014.json
    python -m vlm.score captions  --results=R.json --annotations=dataset_coco.json --split=test
    python -m vlm.score vqa       --results=R.json --annotations=A.json [--questions=Q.json]
    python -m vlm.score nlvr2     --results=R.csv  --annotations=test1.json
    python -m vlm.score retrieval --results=R.npz  --annotations=coco_karpathy_test.json

captions: R is [{"image_id", "caption"}]. BLEU 1-4, ROUGE-L and CIDEr as fractions; --metrics names others, METEOR and
SPICE where Java is there. NoCaps files name each image's domain: each is scored by itself too (in/cider, near/cider,
out/cider); several files, --annotations=NAME=FILE each, do the same.
vqa: R is [{"question_id", "answer"}]. Accuracy in percent.
nlvr2: R is identifier,True lines, or JSON. Accuracy and consistency as fractions.
retrieval: R is an .npz with the scores `image_to_text` [images, texts] and `text_to_image` [texts, images] in the order
of the annotations, or JSON {"image_to_text": {image: [texts, best first]}, "text_to_image": {text: [images]}}. Recall
at 1, 5 and 10 as fractions.

Every image, question or example must have exactly one result; --missing=empty counts what is missing as an empty
answer, --missing=skip scores what is there. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import Parser, UserError, exit_on_user_error
from vlm.evaluation import retrieval
from vlm.evaluation.metrics import captions, files, nlvr2, vqa
from vlm.manifest import write_atomically

TASKS = ("captions", "vqa", "nlvr2", "retrieval")
KS = (1, 5, 10)
# Options that only some tasks have, with what each means where it is not given.
_ONLY = {
    "questions": ("vqa",),
    "split": ("captions", "retrieval"),
    "metrics": ("captions",),
    "missing": ("captions", "vqa"),
    "answer_ids": ("vqa",),
    "normalise": ("vqa",),
}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m vlm.score", description=__doc__)
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--results", required=True, metavar="FILE")
    parser.add_argument("--annotations", required=True, action="append", metavar="[NAME=]FILE")
    parser.add_argument("--questions", metavar="FILE", help="vqa: the questions that must be answered")
    parser.add_argument("--split", metavar="NAME", help="captions, retrieval: part of a Karpathy file, such as test")
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help=f"captions: of {','.join(captions.CHOICES)} (default {','.join(captions.DEFAULT)})",
    )
    parser.add_argument("--missing", choices=("error", "empty", "skip"), help="what has no result (default error)")
    parser.add_argument(
        "--answer_ids", choices=("as_is", "distinct"), help="vqa: how annotators are told apart (default as_is)"
    )
    parser.add_argument("--normalise", choices=vqa.NORMALISE, help="vqa: which answers are normalised (default always)")
    parser.add_argument("--output", metavar="FILE.json", help="write the metrics and every example's scores")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    with exit_on_user_error():
        options = arguments().parse_args(argv)
        for name, tasks in _ONLY.items():
            if getattr(options, name) is not None and options.task not in tasks:
                raise UserError(f"--{name} is an option of {' and '.join(tasks)}, not of {options.task}")
        if options.task != "captions" and len(options.annotations) > 1:
            raise UserError(f"--annotations: expected one file for {options.task}, found {len(options.annotations)}")
        if options.output and not Path(options.output).absolute().parent.is_dir():
            raise UserError(f"--output: no folder {Path(options.output).absolute().parent}")
        if options.output and Path(options.output).is_dir():
            raise UserError(f"--output: expected the name of a file, found the folder {options.output}")
        metrics, examples = _TASKS[options.task](options)
        metrics = {"task": options.task, **metrics}
        if options.output:
            write_atomically(options.output, _json({**metrics, "examples": examples}, indent=1) + b"\n")
    print(_json(metrics).decode())
    return 0


def _json(value: Any, **options: Any) -> bytes:
    """UTF-8; halves of surrogate pairs, which it cannot hold, are escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options).encode(errors="backslashreplace")


Outcome = tuple[dict[str, Any], list[dict[str, Any]]]


def _captions(options: argparse.Namespace) -> Outcome:
    chosen = captions.DEFAULT if options.metrics is None else options.metrics.split(",")
    references: dict[Any, list[str]] = {}
    domains: dict[Any, str] = {}
    for entry in options.annotations:
        name, path = _named(entry)
        found = files.caption_references(path, options.split)
        both = references.keys() & found.captions.keys()
        if both:
            raise UserError(f"--annotations: image {next(iter(both))!r} is in two files")
        references |= found.captions
        domains |= dict.fromkeys(found.captions, name) if name else found.domains
    results = files.caption_results(Path(options.results))
    results = _covering(results, references, options, "image")
    if domains:
        scores = captions.score_domains(results, references, domains, chosen)
    else:
        scores = {"overall": captions.score(results, references, chosen)}
    overall = scores.pop("overall")
    metrics: dict[str, Any] = dict(overall.metrics)
    for name, part in scores.items():
        metrics |= {f"{name}/{key}": value for key, value in (part.metrics | {"n": len(part.ids)}).items()}
    rows = [
        {"image_id": image, "caption": results[image]}
        | {name: float(row[i]) for name, row in overall.per_image.items()}
        for i, image in enumerate(overall.ids)
    ]
    return metrics | {"n": len(overall.ids), "missing": options.missing or "error"}, rows


def _vqa(options: argparse.Namespace) -> Outcome:
    annotations = files.vqa_annotations(Path(options.annotations[0]))
    if options.questions:
        questions = files.vqa_questions(Path(options.questions))
        _same(questions, annotations)
    ids: vqa.AnswerIds = options.answer_ids or "as_is"
    normalise: vqa.Normalise = options.normalise or "always"
    results = _covering(files.vqa_results(Path(options.results)), annotations, options, "question")

    def scored(answer_ids: vqa.AnswerIds) -> vqa.VqaScores:
        return vqa.score(results, annotations, answer_ids=answer_ids, normalise_answers=normalise)

    found = scored(ids)
    metrics: dict[str, Any] = {"accuracy": found.accuracy, "unit": "percent", "n": len(results)}
    metrics |= {"answer_ids": ids, "normalise": normalise}
    if vqa.ids_matter(annotations):
        metrics |= {f"accuracy_{mode}": scored(mode).accuracy for mode in vqa.ANSWER_IDS}
        print(
            "note: annotations without answer_id: equal answers count once (--answer_ids=as_is), or each (distinct)",
            file=sys.stderr,
        )
    metrics |= {"missing": options.missing or "error"}
    metrics |= {"per_answer_type": found.per_answer_type, "per_question_type": found.per_question_type}
    rows = [
        {"question_id": question, "answer": results[question], "accuracy": value}
        for question, value in found.per_question.items()
    ]
    return metrics, rows


def _nlvr2(options: argparse.Namespace) -> Outcome:
    labels, sentences = files.nlvr2_labels(Path(options.annotations[0]))
    predictions = files.nlvr2_predictions(Path(options.results))
    _check_ids(predictions, labels, "example", missing="error")
    metrics = nlvr2.score(predictions, labels, sentences)
    counts = {"n": len(labels), "sentences": len(set(sentences.values()))}
    rows = [
        {"identifier": name, "prediction": predictions[name], "correct": predictions[name] == label}
        for name, label in labels.items()
    ]
    return metrics | counts, rows


def _retrieval(options: argparse.Namespace) -> Outcome:
    texts = files.retrieval_texts(Path(options.annotations[0]), options.split)
    text_image = np.asarray(texts.text_image)
    path = Path(options.results)
    ranks = _matrix_ranks(path, texts, text_image) if path.suffix == ".npz" else _list_ranks(path, texts, text_image)
    metrics: dict[str, Any] = dict(retrieval.recall(ranks, KS))
    rows = [{"text": text, "place": int(place)} for text, place in zip(texts.texts, ranks.text_to_image, strict=True)]
    rows += [
        {"image": image, "place": int(place)} for image, place in zip(texts.images, ranks.image_to_text, strict=True)
    ]
    return metrics | {"images": len(texts.images), "texts": len(texts.texts)}, rows


_TASKS = {"captions": _captions, "vqa": _vqa, "nlvr2": _nlvr2, "retrieval": _retrieval}


def _matrix_ranks(path: Path, texts: files.RetrievalTexts, text_image: np.ndarray) -> retrieval.Ranks:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("image_to_text", "text_to_image") if name in archive}
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise UserError(f"{path}: not an .npz of plain arrays ({error})") from None
    shape = (len(texts.images), len(texts.texts))
    for name, expected in (("image_to_text", shape), ("text_to_image", shape[::-1])):
        if name not in arrays or arrays[name].shape != expected or arrays[name].dtype.kind != "f":
            found = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "nothing"
            raise UserError(f"{path}: expected {name!r}, floating point {expected}, found {found}")
        if np.isnan(arrays[name]).any():
            raise UserError(f"{path}: {name!r} holds NaN")
    return retrieval.score_ranks(arrays["image_to_text"], arrays["text_to_image"], text_image)


def _list_ranks(path: Path, texts: files.RetrievalTexts, text_image: np.ndarray) -> retrieval.Ranks:
    content = files.read_json(path)
    sides = {"image_to_text": (texts.images, texts.texts), "text_to_image": (texts.texts, texts.images)}
    lists: dict[str, list[list[int]]] = {}
    for side, (queries, items) in sides.items():
        given = content.get(side) if isinstance(content, Mapping) else None
        if not isinstance(given, Mapping):
            raise UserError(f"{path}: expected {side!r}, an object of lists")
        names = {str(item): number for number, item in enumerate(items)}
        _check_ids(given, dict.fromkeys(map(str, queries)), side, missing="error")
        lists[side] = [_numbers(given[str(query)], names, f"{path}: {side} of {query}") for query in queries]
    return retrieval.list_ranks(lists["image_to_text"], lists["text_to_image"], text_image)


def _numbers(row: Any, names: Mapping[str, int], where: str) -> list[int]:
    if not isinstance(row, list):
        raise UserError(f"{where}: expected a list, found {type(row).__name__}")
    unknown = [item for item in row if str(item) not in names]
    if unknown or len(set(map(str, row))) < len(row):
        raise UserError(f"{where}: " + (f"{unknown[0]!r} is unknown" if unknown else "an item is there twice"))
    if len(row) < min(max(KS), len(names)):
        raise UserError(f"{where}: expected at least {min(max(KS), len(names))} items, found {len(row)}")
    return [names[str(item)] for item in row]


def _named(entry: str) -> tuple[str, Path]:
    """`NAME=FILE` or `FILE`."""
    name, separator, path = entry.partition("=")
    return (name, Path(path)) if separator and "/" not in name and not Path(entry).exists() else ("", Path(entry))


def _covering(
    results: Mapping[Any, str], expected: Mapping[Any, Any], options: argparse.Namespace, what: str
) -> dict[Any, str]:
    """The results in the order of what is expected, and those missing as `--missing` says."""
    missing = options.missing or "error"
    _check_ids(results, expected, what, missing)
    return {key: results.get(key, "") for key in expected if key in results or missing == "empty"}


def _check_ids(results: Iterable[Any], expected: Mapping[Any, Any], what: str, missing: str) -> None:
    results = dict.fromkeys(results)
    unknown = [key for key in results if key not in expected]
    if unknown:
        raise UserError(
            f"--results: {len(unknown)} of {len(results)} {what} ids are not annotated, the first is {unknown[0]!r}"
        )
    absent = [key for key in expected if key not in results]
    if absent and (missing == "error" or len(absent) == len(expected)):
        raise UserError(
            f"--results: {len(absent)} of {len(expected)} {what} ids have no result, the first is {absent[0]!r}"
        )


def _same(questions: Mapping[Any, Any], annotations: Mapping[Any, Any]) -> None:
    different = questions.keys() ^ annotations.keys()
    if different:
        key = next(iter(different))
        place = "questions" if key in questions else "annotations"
        raise UserError(f"--questions: {len(different)} ids differ from --annotations; {key!r} is in the {place} only")


if __name__ == "__main__":
    sys.exit(main())
