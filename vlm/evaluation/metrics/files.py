"""Readers of the official annotation and result files of captioning, question answering, NLVR2 and retrieval.

Ids are compared as integers where they are written as such (`"000042"` is 42), as strings otherwise.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm.data.fields import parse_json
from vlm.errors import UserError

Id = int | str
MAX_BYTES = 4 << 30


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
    lists of `{"image", "caption": [...]}`, whose image id is the number in the file name.

    Args:
      split: the part to read, for Karpathy's original.

    Raises:
      UserError: another format, an id twice, an image without caption, or a split that does not exist.
    """
    content = read_json(path)
    captions: dict[Id, list[str]] = {}
    domains: dict[Id, str] = {}
    if isinstance(content, list):
        for where, record in _records(content, path, "image", "caption"):
            texts = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
            image = _image_number(_text(record, "image", where))
            captions.setdefault(image, []).extend(_text({"caption": text}, "caption", where) for text in texts)
    elif _karpathy(content):
        for where, record in _of_split(content, path, split):
            image = record.get("cocoid", record.get("imgid"))
            captions[_id(image, where)] = [_text(sentence, "raw", where) for sentence in record["sentences"]]
    else:
        for where, record in _records(_list(content, "annotations", path), path, "image_id", "caption"):
            captions.setdefault(_id(record["image_id"], where), []).append(_text(record, "caption", where))
        for where, record in _records(_list(content, "images", path), path, "id"):
            image = _id(record["id"], where)
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
        if "answers" not in record and isinstance(record.get("answer"), list):
            answers = [{"answer": text, "answer_id": number} for number, text in enumerate(record["answer"], 1)]
            record = record | {"answers": answers}
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, Mapping) for answer in answers):
            raise UserError(f"{where}: expected 'answers', a list of objects with 'answer'")
        for answer in answers:
            _text(answer, "answer", where)
        _add(found, _id(record["question_id"], where), record, where)
    return found


def vqa_questions(path: Path) -> dict[Id, dict[str, Any]]:
    """Reads `{"questions": [{"question_id", "question", …}]}`, or the list alone.

    Raises:
      UserError: another format, or a question twice.
    """
    content = read_json(path)
    found: dict[Id, dict[str, Any]] = {}
    records = content if isinstance(content, list) else _list(content, "questions", path)
    for where, record in _records(records, path, "question_id", "question"):
        _add(found, _id(record["question_id"], where), record, where)
    return found


def vqa_results(path: Path) -> dict[Id, str]:
    """Reads `[{"question_id", "answer"}]`; raises UserError for another format or a question twice."""
    return _by_id(path, read_json(path), "question_id", "answer")


def nlvr2_labels(path: Path) -> dict[str, bool]:
    """Reads the official JSON lines, each with `identifier` and `label`; raises UserError for another format."""
    found: dict[str, bool] = {}
    for where, record in _lines(path):
        for name in ("identifier", "label"):
            _text(record, name, where)
        _add(found, record["identifier"], _truth(record["label"], where), where)
    return found


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
    pairs: list[tuple[Id, list[Id | None]]] = []
    if isinstance(content, list):
        for where, record in _records(content, path, "image", "caption"):
            texts = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
            pairs.append((_text(record, "image", where), [None] * len(texts)))
    elif _karpathy(content):
        for where, record in _of_split(content, path, split):
            texts = [_id(sentence.get("sentid"), where) for sentence in record["sentences"]]
            pairs.append((_id(record.get("imgid"), where), list(texts)))
    else:
        images = {
            _id(record["id"], where): [] for where, record in _records(_list(content, "images", path), path, "id")
        }
        for where, record in _records(_list(content, "annotations", path), path, "image_id", "id"):
            images.setdefault(_id(record["image_id"], where), []).append(_id(record["id"], where))
        pairs = list(images.items())
    texts = [text for _, row in pairs for text in row]
    bare = [image for image, row in pairs if not row]
    if bare or not pairs:
        raise UserError(f"{path}: image {bare[0]!r} has no text" if bare else f"{path}: holds no images")
    return RetrievalTexts(
        [image for image, _ in pairs],
        [number if text is None else text for number, text in enumerate(texts)],
        [number for number, (_, row) in enumerate(pairs) for _ in row],
    )


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


def _of_split(content: Any, path: Path, split: str | None) -> list[tuple[str, dict[str, Any]]]:
    records = list(_records(content["images"], path, "sentences", "split"))
    splits = sorted({str(record["split"]) for _, record in records})
    if split not in splits:
        raise UserError(f"{path}: --split: expected one of {', '.join(splits)}, found {split or 'nothing'}")
    return [(where, record) for where, record in records if record["split"] == split]


def _by_id(path: Path, content: Any, key: str, value: str) -> dict[Id, str]:
    found: dict[Id, str] = {}
    for where, record in _records(content, path, key, value):
        _add(found, _id(record[key], where), _text(record, value, where), where)
    return found


def _add(found: dict[Any, Any], key: Id, value: Any, where: str) -> None:
    if key in found:
        raise UserError(f"{where}: {key!r} is there twice")
    found[key] = value


def _id(value: Any, where: str) -> Id:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise UserError(f"{where}: expected an id, an integer or a string, found {value!r}")
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value, re.ASCII) else value


def _image_number(name: str) -> Id:
    stem = Path(name).stem
    digits = re.findall(r"\d+", stem, re.ASCII)
    return _id(digits[-1], name) if digits else stem


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
