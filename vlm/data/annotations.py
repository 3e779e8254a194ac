"""Annotation files in the forms in which COCO, VQA and Karpathy's splits are published, as plain records.

    captions_*.json           {"images": [{id, file_name}], "annotations": [{image_id, caption}]}; also NoCaps
    dataset_coco.json, …      {"images": [{filename, filepath, split, cocoid, sentences: [{raw}]}]}
    v2_OpenEnded_*.json       {"questions": [{image_id, question_id, question}]}, with a file of answers beside it:
    v2_mscoco_*.json          {"annotations": [{question_id, question_type, answer_type, answers: [{answer}]}]}
    NLVR2's train.json, dev.json, test1.json, … (JSON Lines): {identifier, sentence, label[, directory]} a line

A record has `image` (a relative path, where the file tells it) and `image_id`; captions are a list under `caption`, of
questions there are `question`, `question_id` and, where given, `answer` (a list), `question_type`, `answer_type`; and
where nothing but their whole records tells those who answered apart, these under `answers`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from vlm.data.json_scan import Element, read_document, scan
from vlm.errors import UserError

Record = dict[str, Any]
_NLVR2 = re.compile(r"(?P<pair>(?P<split>train|dev|test[12])-\d{1,6}-\d{1,4})-\d{1,4}")


def read_answer_list(path: str) -> list[str]:
    """Reads a list of candidate answers, such as BLIP's answer_list.json.

    Raises:
        UserError: not a list of different strings.
    """
    answers: list[str] = []
    for element in scan(read_document(path), path):
        if element.section or not isinstance(element.value, str) or not element.value:
            raise UserError(f"{path}: record {element.number}: expected an answer, found {element.value!r:.80}")
        answers.append(element.value)
    twice = next((a for a, b in zip(sorted(answers), sorted(answers)[1:], strict=False) if a == b), None)
    if twice is not None or not answers:
        found = f"{twice!r} twice" if answers else "none"
        raise UserError(f"{path}: expected a list of different answers, found {found}")
    return answers


def frequent_answers(paths: Iterable[str], count: int) -> list[str]:
    """The answers that most questions have, of files of VQA annotations; a classifier's classes.

    A question's answer is its `multiple_choice_answer`, the one that most people gave; without one it is found so, of
    equally many the first given. Answers are compared in lower case. The most frequent come first, equally frequent
    ones in alphabetical order. Of VQAv2, 3,129 are usual (Teney et al. 2018).

    Raises:
        UserError: a file that holds no annotations, or fewer different answers than `count`.
    """
    counts: Counter[str] = Counter()
    for path in paths:
        before = counts.total()
        for element in scan(read_document(path), path):
            if element.section != "annotations" or not element.number:
                continue
            where = f"{path}: annotations record {element.number}"
            answer = element.value.get("multiple_choice_answer") if isinstance(element.value, dict) else None
            if answer is None:
                given = [_get(answer, "answer", where) for answer in _get(element.value, "answers", where)]
                answer = Counter(given).most_common(1)[0][0] if given else ""
            counts[str(answer).strip().lower()] += 1
        if counts.total() == before:
            raise UserError(f"{path}: expected VQA annotations, found none")
    counts.pop("", None)
    if len(counts) < count:
        raise UserError(f"expected at least {count} different answers, found {len(counts)}")
    return sorted(counts, key=lambda answer: (-counts[answer], answer))[:count]


def nlvr2_record(record: Record) -> Record:
    """A line of NLVR2's own files with `text`, and `image`, the pair that its identifier names; others as they are.

    Line dev-896-0-1 (split, set, pair, sentence) is about dev/dev-896-0-img0.png (left) and dev/dev-896-0-img1.png;
    training images lie one folder deeper, in train/<directory>.
    """
    identifier, sentence = record.get("identifier"), record.get("sentence")
    found = _NLVR2.fullmatch(identifier) if isinstance(identifier, str) and isinstance(sentence, str) else None
    if found is None or not record.keys().isdisjoint(("image", "images")):
        return record
    folder = "/".join([found["split"], *([str(record["directory"])] if "directory" in record else [])])
    pair = [f"{folder}/{found['pair']}-img{side}.png" for side in (0, 1)]
    return {"text": sentence, **record, "image": pair}


def published_records(elements: Iterable[Element], path: str, answers: str | None = None) -> Iterator[Record]:
    """Turns the elements of a published file into records, in the file's order of images or questions.

    Args:
        elements: of the whole document (`json_scan.scan`).
        answers: file of VQA answers that belongs to questions.

    Raises:
        UserError: a form that is not known, an entry without a key it must have, or entries that do not fit together.
    """
    lists: dict[str, list[Record]] = {}
    members: Record = {}
    for element in elements:
        where = f"{path}: {element.section} record {element.number}"
        if not element.number:
            members[element.section] = element.value
        elif not isinstance(element.value, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(element.value).__name__}")
        else:
            lists.setdefault(element.section, []).append(element.value)
    images = lists.get("images", [])
    if answers is not None and "questions" not in lists:
        raise UserError(f"{path}: `annotations` belong to a file of questions, found {', '.join(lists) or 'no list'}")
    if "questions" in lists:
        return _questions(lists["questions"], members, path, answers)
    if images and "sentences" in images[0]:
        return _karpathy(images, path)
    if images and "id" in images[0]:
        return _coco(images, lists.get("annotations", []), path)
    found = ", ".join([*lists, *members]) or "nothing"
    raise UserError(
        f"{path}: expected a list of records, COCO captions, VQA questions or Karpathy's images, found {found}"
    )


def _coco(images: list[Record], captions: list[Record], path: str) -> Iterator[Record]:
    by_id: dict[Any, Record] = {}
    for number, image in enumerate(images, 1):
        where = f"{path}: images record {number}"
        identity = _get(image, "id", where)
        if identity in by_id:
            raise UserError(f"{where}: id {identity!r} stands twice")
        rest = {key: value for key, value in image.items() if key not in ("id", "file_name")}
        name = {"image": image["file_name"]} if image.get("file_name") else {}
        by_id[identity] = {**name, "image_id": identity, **rest}
    for number, entry in enumerate(captions, 1):
        where = f"{path}: annotations record {number}"
        identity, caption = _get(entry, "image_id", where), _get(entry, "caption", where)
        if identity not in by_id:
            raise UserError(f"{where}: image_id {identity!r} is not among the images")
        by_id[identity].setdefault("caption", []).append(caption)
    yield from by_id.values()


def _karpathy(images: list[Record], path: str) -> Iterator[Record]:
    for number, image in enumerate(images, 1):
        where = f"{path}: images record {number}"
        folder, name = image.get("filepath"), _get(image, "filename", where)
        identity = image["cocoid"] if "cocoid" in image else _get(image, "imgid", where)
        yield {
            "image": f"{folder}/{name}" if folder else name,
            "image_id": identity,
            "caption": [_get(sentence, "raw", where) for sentence in _get(image, "sentences", where)],
            "split": image.get("split"),
        }


def _questions(questions: list[Record], members: Record, path: str, answers: str | None) -> Iterator[Record]:
    subtype = str(members.get("data_subtype") or "").replace("test-dev", "test")
    known = _read_answers(answers) if answers is not None else None
    for number, entry in enumerate(questions, 1):
        where = f"{path}: questions record {number}"
        record = {key: _get(entry, key, where) for key in ("question_id", "question", "image_id")}
        image_id = record["image_id"]
        if subtype and str(image_id).isdigit():
            record["image"] = f"{subtype}/COCO_{subtype}_{int(image_id):012d}.jpg"
        if known is not None:
            if record["question_id"] not in known:
                raise UserError(f"{where}: question_id {record['question_id']!r} has no answers in {answers}")
            record |= known.pop(record["question_id"])
        yield record
    if known:
        raise UserError(f"{answers}: question_id {next(iter(known))!r} is not among the questions of {path}")


def _read_answers(path: str) -> dict[Any, Record]:
    known: dict[Any, Record] = {}
    for element in scan(read_document(path), path):
        if element.section != "annotations":
            continue
        where = f"{path}: annotations record {element.number}"
        identity = _get(element.value, "question_id", where)
        if identity in known:
            raise UserError(f"{where}: question_id {identity!r} stands twice")
        given = [_get(answer, "answer", where) for answer in _get(element.value, "answers", where)]
        kinds = {key: element.value[key] for key in ("question_type", "answer_type") if key in element.value}
        known[identity] = {"answer": given, **kinds}
        if not all("answer_id" in answer for answer in element.value["answers"]):
            known[identity]["answers"] = element.value["answers"]
    return known


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(entry).__name__}")
    if entry.get(key) is None:
        raise UserError(f"{where}: no {key!r}, found {', '.join(map(str, entry)) or 'nothing'}")
    return entry[key]
