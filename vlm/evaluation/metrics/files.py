"""Readers of the official annotation and result files of captioning, question answering, NLVR2 and retrieval.

Ids are compared as integers where they are written as such (`"000042"` is 42), as strings otherwise.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm.data.fields import parse_json
from vlm.errors import UserError
from vlm.evaluation.metrics.nlvr2 import sentence as sentence_name

Id = int | str
MAX_BYTES = 4 << 30
IMAGE_IDS = ("image_id", "img_id")


@dataclasses.dataclass(frozen=True)
class CaptionReferences:
    """Attributes:
    captions: {image: its reference captions}.
    domains: {image: domain} of NoCaps files; empty elsewhere.
    """

    captions: dict[Id, list[str]]
    domains: dict[Id, str]


@dataclasses.dataclass(frozen=True)
class RetrievalTexts:
    """Attributes:
    images: what images are called, in the order of their numbers.
    texts: what texts are called, in the order of their numbers.
    text_image: number of each text's image.
    """

    images: list[Id]
    texts: list[Id]
    text_image: list[int]


def caption_references(path: Path, split: str | None = None) -> CaptionReferences:
    """Reads reference captions.

    Formats: COCO and NoCaps (`images`, `annotations`), Karpathy's original (`images` with `sentences` and `split`), and
    lists of `{"image", "caption": [...]}`, where images without an id of their own are called by their files
    (`image_ids`).

    Args:
      split: the part to read, for Karpathy's original.

    Raises:
      UserError: another format, an id twice, an image without caption, or a split that does not exist.
    """
    content = read_json(path)
    captions: dict[Id, list[str]] = {}
    domains: dict[Id, str] = {}
    if isinstance(content, list):
        _no_split(path, split)
        records = list(_records(content, path, "image", "caption"))
        named = image_ids(_text(record, "image", where) for where, record in records)
        for where, record in records:
            own = own_id(record, where)
            captions.setdefault(named[record["image"]] if own is None else own, []).extend(_captions(record, where))
    elif _karpathy(content):
        for where, record in _of_split(content, path, split):
            image = as_id(record.get("cocoid", record.get("imgid")), where)
            _add(captions, image, [_text(sentence, "raw", where) for sentence in _sentences(record, where)], where)
    else:
        _no_split(path, split)
        for where, record in _records(_list(content, "annotations", path), path, "image_id", "caption"):
            captions.setdefault(as_id(record["image_id"], where), []).append(_text(record, "caption", where))
        for where, record in _records(_list(content, "images", path), path, "id"):
            image = as_id(record["id"], where)
            captions.setdefault(image, [])
            if "domain" in record:
                domains[image] = _text(record, "domain", where)
    bare = [image for image, texts in captions.items() if not texts]
    if bare or not captions:
        raise UserError(f"{path}: {len(bare)} images without caption" if captions else f"{path}: holds no captions")
    return CaptionReferences(captions, domains)


def caption_results(path: Path) -> dict[Id, str]:
    """Reads `[{"image_id", "caption"}]`; raises UserError for another format or an image twice."""
    return _by_id(path, read_json(path), "image_id", "caption")


def vqa_annotations(path: Path) -> dict[Id, dict[str, Any]]:
    """Reads `{"annotations": [{"question_id", "answers": [{"answer", …}], …}]}`, or a list with plain answers.

    In lists of `{"question_id", "answer": [10 strings]}` every answer is another annotator's.

    Raises:
      UserError: another format (test sets have no annotations), a question twice or without answers.
    """
    content = read_json(path)
    found: dict[Id, dict[str, Any]] = {}
    records = content if isinstance(content, list) else _list(content, "annotations", path)
    for where, record in _records(records, path, "question_id"):
        answers = record.get("answers", record.get("answer") if isinstance(record.get("answer"), list) else None)
        record = record | {"answers": answer_records(answers, where)}
        _add(found, as_id(record["question_id"], where), record, where)
    return found


def answer_records(answers: Any, where: str) -> list[dict[str, Any]]:
    """People's answers to one question as official records; of plain strings every one is another annotator's.

    Raises:
      UserError: something else, or none; `where` names the question.
    """
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: expected 'answers', a list of objects with 'answer', found {answers!r:.60}")
    if all(isinstance(answer, str) for answer in answers):
        return [{"answer": text, "answer_id": number} for number, text in enumerate(answers, 1)]
    for answer in answers:
        _text(answer, "answer", where)
        if answer.get("answer_id") is not None:
            as_id(answer["answer_id"], where)
    return answers


def vqa_questions(path: Path) -> dict[Id, dict[str, Any]]:
    """Reads `{"questions": [{"question_id", "question", …}]}`, or the list alone.

    Raises:
      UserError: another format, or a question twice.
    """
    content = read_json(path)
    found: dict[Id, dict[str, Any]] = {}
    records = content if isinstance(content, list) else _list(content, "questions", path)
    for where, record in _records(records, path, "question_id", "question"):
        _add(found, as_id(record["question_id"], where), record, where)
    return found


def vqa_results(path: Path) -> dict[Id, str]:
    """Reads `[{"question_id", "answer"}]`; raises UserError for another format or a question twice."""
    return _by_id(path, read_json(path), "question_id", "answer")


def nlvr2_labels(path: Path) -> tuple[dict[str, bool], dict[str, str]]:
    """Reads the official JSON lines, each with `identifier` and `label`, or a list with `sentence` and `label`.

    Returns:
      {identifier: label} and {identifier: what names its sentence}. A list's examples are called by the file and their
      number in it ("nlvr_dev.json:1" is the first), and their sentences by the text.

    Raises:
      UserError: another format.
    """
    labels: dict[str, bool] = {}
    sentences: dict[str, str] = {}
    data = _read(path)
    if data.lstrip()[:1] == b"[":
        for number, (where, record) in enumerate(_records(parse_json(data, str(path)), path, "sentence", "label"), 1):
            name = str(record.get("identifier", f"{path.name}:{number}"))
            _add(labels, name, _truth(record["label"], where), where)
            sentences[name] = _text(record, "sentence", where)
        return labels, sentences
    for where, record in _lines(path):
        for name in ("identifier", "label"):
            _text(record, name, where)
        _add(labels, record["identifier"], _truth(record["label"], where), where)
        sentences[record["identifier"]] = sentence_name(record["identifier"])
    return labels, sentences


def nlvr2_predictions(path: Path) -> dict[str, bool]:
    """Reads predictions: the official CSV `identifier,True`, or JSON: `identifier` and `prediction` in a list or lines.

    Raises:
      UserError: another format, a prediction that is not true or false, or an identifier twice.
    """
    found: dict[str, bool] = {}
    data = _read(path)
    first = data.lstrip()[:1]
    if first in (b"[", b"{"):
        for where, record in _lines(path) if first == b"{" else _records(parse_json(data, str(path)), path):
            value = record.get("prediction", record.get("label"))
            if "identifier" not in record or value is None:
                raise UserError(f"{where}: expected 'identifier' and 'prediction', found {', '.join(record)}")
            _add(found, str(record["identifier"]), _truth(value, where), where)
        return found
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        where = f"{path}: line {number}"
        parts = [part.strip() for part in line.split(",")]
        if not line.strip() or parts[:2] == ["identifier", "prediction"]:
            continue
        if len(parts) < 2:
            raise UserError(f"{where}: expected identifier,prediction, found {line[:80]!r}")
        _add(found, parts[0].removesuffix(".png"), _truth(parts[1], where), where)
    return found


def retrieval_texts(path: Path, split: str | None = None) -> RetrievalTexts:
    """Reads which texts belong to which image.

    Formats: lists of `{"image", "caption": [...]}` (images called by `image`, texts by their number), Karpathy's
    original (`imgid`, `sentid`), COCO (`id` of images and annotations).

    Raises:
      UserError: as `caption_references`.
    """
    content = read_json(path)
    images: dict[Id, list[Id]] = {}
    if isinstance(content, list):
        _no_split(path, split)
        count = 0
        for where, record in _records(content, path, "image", "caption"):
            texts = _captions(record, where)
            images.setdefault(_text(record, "image", where), []).extend(range(count, count + len(texts)))
            count += len(texts)
    elif _karpathy(content):
        for where, record in _of_split(content, path, split):
            texts = [as_id(sentence.get("sentid"), where) for sentence in _sentences(record, where)]
            _add(images, as_id(record.get("imgid"), where), texts, where)
    else:
        _no_split(path, split)
        for where, record in _records(_list(content, "images", path), path, "id"):
            images.setdefault(as_id(record["id"], where), [])
        for where, record in _records(_list(content, "annotations", path), path, "image_id", "id"):
            images.setdefault(as_id(record["image_id"], where), []).append(as_id(record["id"], where))
    bare = [image for image, row in images.items() if not row]
    if bare or not images:
        raise UserError(f"{path}: image {bare[0]!r} has no text" if bare else f"{path}: holds no images")
    pairs = [(text, number) for number, row in enumerate(images.values()) for text in row]
    if isinstance(content, list):
        pairs.sort()  # back in the file's order, which is what texts are numbered by
    return RetrievalTexts(list(images), [text for text, _ in pairs], [number for _, number in pairs])


def own_id(record: Mapping[str, Any], where: str) -> Id | None:
    """The id that a record or example gives its image, if any."""
    name = next((name for name in IMAGE_IDS if record.get(name) is not None), None)
    return None if name is None else as_id(record[name], where)


def image_ids(names: Iterable[str]) -> dict[str, Id]:
    """What images are called by their files: the last number in the name, as in COCO's, or the name without suffix.

    Where that calls two files the same, as a/1.jpg and b/1.jpg, all are called by their paths as given.
    """
    found = {name: image_number(name, name) for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def image_number(value: Any, where: str) -> Id:
    """An id, or of a file's name the last number in it; a name without number without its suffix.

    Raises:
      UserError: something else; `where` says where.
    """
    if not isinstance(value, str) or not value:
        return as_id(value, where)
    stem = Path(value).stem
    digits = re.findall(r"\d+", stem, re.ASCII)
    return as_id(digits[-1], where) if digits else stem


def as_id(value: Any, where: str) -> Id:
    """An id as it is compared; raises UserError for what is none."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, str)) or value == "":
        raise UserError(f"{where}: expected an id, an integer or a string, found {value!r:.60}")
    return value if isinstance(value, str) and not re.fullmatch(r"\d{1,18}", value, re.ASCII) else int(value)


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises UserError where it is not one."""
    return parse_json(_read(path), str(path))


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size:,} bytes (limit {MAX_BYTES:,})")
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf")


def _lines(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            where = f"{path}: line {number}"
            record = parse_json(line, where)
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
            yield where, record


def _records(content: Any, path: Path, *needed: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list, found {type(content).__name__}")
    for number, record in enumerate(content):
        where = f"{path}: entry {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {type(record).__name__}")
        for name in needed:
            if name not in record:
                raise UserError(f"{where}: expected {name!r}, found {', '.join(record) or 'nothing'}")
        yield where, record


def _list(content: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(content, Mapping) or not isinstance(content.get(name), list):
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{path}: expected {name!r}, a list; found {found or 'nothing'}")
    return content[name]


def _karpathy(content: Any) -> bool:
    images = content.get("images") if isinstance(content, Mapping) else None
    return bool(images) and isinstance(images, list) and isinstance(images[0], Mapping) and "sentences" in images[0]


def _no_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise UserError(f"--split: {path} has no splits, only Karpathy's original has")


def _captions(record: Mapping[str, Any], where: str) -> list[str]:
    texts = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
    return [_text({"caption": text}, "caption", where) for text in texts]


def _sentences(record: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    found = record["sentences"]
    if not isinstance(found, list) or not all(isinstance(sentence, Mapping) for sentence in found):
        raise UserError(f"{where}: expected 'sentences', a list of objects, found {found!r:.80}")
    return found


def _of_split(content: Any, path: Path, split: str | None) -> list[tuple[str, dict[str, Any]]]:
    records = list(_records(content["images"], path, "sentences", "split"))
    splits = sorted({str(record["split"]) for _, record in records})
    if split not in splits:
        raise UserError(f"{path}: --split: expected one of {', '.join(splits)}, found {split or 'nothing'}")
    return [(where, record) for where, record in records if record["split"] == split]


def _by_id(path: Path, content: Any, key: str, value: str) -> dict[Id, str]:
    found: dict[Id, str] = {}
    for where, record in _records(content, path, key, value):
        _add(found, as_id(record[key], where), _text(record, value, where), where)
    return found


def _add(found: dict[Any, Any], key: Id, value: Any, where: str) -> None:
    if key in found:
        raise UserError(f"{where}: {key!r} is there twice")
    found[key] = value


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise UserError(f"{where}: expected {name!r}, a string, found {value!r}")
    return value


def _truth(value: Any, where: str) -> bool:
    word = str(value).strip().lower()
    if word not in ("true", "false"):
        raise UserError(f"{where}: expected True or False, found {value!r}")
    return word == "true"
