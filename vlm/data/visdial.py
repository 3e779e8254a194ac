"""VisDial v1.0 (Das et al. 2017, arXiv 1611.08669): dialogs about images, every question with candidate answers."""

from __future__ import annotations

import array
import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm.data.image_files import ImageFiles
from vlm.data.json_scan import read_document, scan
from vlm.data.shards import expand
from vlm.errors import UserError

_COCO = ("train2014/COCO_train2014_{:012d}.jpg", "val2014/COCO_val2014_{:012d}.jpg")


class _Round(NamedTuple):
    dialog: int
    number: int
    question: int
    right: int


class VisDialSource:
    """Random access to the rounds that have candidate answers, of a file as it is published:

        {"split": "val2018", "data": {"questions": ["…"], "answers": ["…"], "dialogs": [{"image_id", "caption",
         "dialog": [{"question": 7, "answer": 3, "answer_options": [3, 9, …], "gt_index": 0}]}]}}

    An example has `image`, `image_id`, `round` (from 1), `caption`, `history` (a [question, answer] for each earlier
    round), `question`, `options` (texts), `answer` (the right one's place in them; test splits lack it), and
    `relevance` (a number for each option) where there are annotations.

    Args:
        path: the file.
        annotations: its dense annotations, a list of {image_id, round_id, gt_relevance}.
        root: folder of the images; None means the file's own. Those of a split NAME are there as
            VisualDialog_NAME/VisualDialog_NAME_<12 digits>.jpg, of "train" as COCO's train2014/… and val2014/….
        name: how the source is called in messages and in the skip ledger.
        max_bytes: largest image file that is read.

    Raises:
        UserError: at construction for a missing or truncated file, another form, or numbers that name nothing.
    """

    def __init__(
        self,
        path: str,
        *,
        annotations: str | None = None,
        root: str | None = None,
        name: str = "",
        max_bytes: int = 64 << 20,
    ):
        (self._path,) = expand(path, num_shards=1)
        self.name = name or f"visdial:{path}"
        self._images = ImageFiles(root, os.path.dirname(self._path), max_bytes)
        self._texts: dict[str, list[str]] = {"questions": [], "answers": []}
        self._turns: list[list[tuple[int, int]]] = []
        self._dialogs: list[tuple[int, str]] = []
        self._rounds: list[_Round] = []
        self._options = np.zeros((0, 0), np.int32)
        self._split = "train"
        self._read()
        self._relevance = {} if annotations is None else self._annotated(expand(annotations, num_shards=1)[0])
        sizes = os.path.basename(self._path), os.path.getsize(self._path), len(self), len(self._relevance)
        self.fingerprint = hashlib.sha256(repr(sizes).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the example; raises UserError for an image that cannot be read."""
        at, questions, answers = self._rounds[index], self._texts["questions"], self._texts["answers"]
        image_id, caption = self._dialogs[at.dialog]
        history = self._turns[at.dialog][: at.number - 1]
        key = f"{image_id}:{at.number}"
        example: dict[str, Any] = {"key": key, "image_id": image_id, "round": at.number, "caption": caption}
        example["image"] = self._image(image_id, f"{self._path}: {key}")
        example["history"] = [[questions[question], answers[answer]] for question, answer in history]
        example |= {"question": questions[at.question], "options": [answers[i] for i in self._options[index]]}
        if at.right >= 0:
            example["answer"] = at.right
        relevance = self._relevance.get((image_id, at.number))
        return example if relevance is None else example | {"relevance": relevance}

    def _image(self, image_id: int, where: str) -> bytes:
        names = (
            _COCO
            if self._split == "train"
            else (f"VisualDialog_{self._split}/VisualDialog_{self._split}_{{:012d}}.jpg",)
        )
        for name in names[:-1]:
            try:
                return self._images.read(name.format(image_id), where)
            except UserError:
                continue
        return self._images.read(names[-1].format(image_id), where)

    def _read(self) -> None:
        options, count = array.array("i"), 0
        for element in scan(read_document(self._path), self._path, within="data"):
            where = f"{self._path}: {element.section} record {element.number}"
            if element.section == "split":
                self._split = str(element.value)
            elif element.section in self._texts and isinstance(element.value, str):
                self._texts[element.section].append(element.value)
            elif element.section == "dialogs":
                for given in self._dialog(element.value, where):
                    count = count or len(given)
                    if len(given) != count:
                        raise UserError(f"{where}: expected {count} answer_options, as before, found {len(given)}")
                    options.extend(given)
        if not self._rounds:
            raise UserError(f"{self._path}: expected VisDial's dialogs with answer_options, found none")
        self._options = np.frombuffer(options, np.int32).reshape(len(self._rounds), count)
        turns = [turn for dialog in self._turns for turn in dialog]
        answers = max(int(self._options.max()), *(turn[1] for turn in turns))
        for name, most in {"questions": max(turn[0] for turn in turns), "answers": answers}.items():
            if most >= len(self._texts[name]):
                raise UserError(f"{self._path}: {name}: expected one of number {most}, found {len(self._texts[name])}")

    def _dialog(self, value: Any, where: str) -> list[list[int]]:
        """Takes in one dialog; returns the candidates of each of its rounds that has some."""
        found, turns = [], []
        try:
            self._dialogs.append((int(value["image_id"]), str(value["caption"])))
            for number, turn in enumerate(value["dialog"], 1):
                given = turn.get("answer_options")
                right = int(turn.get("gt_index", -1))
                if any(answer < 0 for _, answer in turns):  # only the last round may lack its answer
                    raise ValueError
                turns.append((int(turn["question"]), int(turn.get("answer", -1))))
                if given:
                    if not -1 <= right < len(given) or not all(
                        isinstance(option, int) and option >= 0 for option in given
                    ):
                        raise ValueError
                    self._rounds.append(_Round(len(self._turns), number, turns[-1][0], right))
                    found.append(given)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{where}: no dialog of VisDial: {value!r:.80}") from None
        self._turns.append(turns)
        return found

    def _annotated(self, path: str) -> dict[tuple[int, int], Sequence[float]]:
        """By image and round: how right each option is."""
        known = {(self._dialogs[at.dialog][0], at.number) for at in self._rounds}
        found: dict[tuple[int, int], Sequence[float]] = {}
        for element in scan(read_document(path), path):
            record, where = element.value, f"{path}: record {element.number}"
            values = record.get("gt_relevance", record.get("relevance")) if isinstance(record, dict) else None
            if not isinstance(values, list) or len(values) != self._options.shape[1]:
                raise UserError(f"{where}: expected gt_relevance of {self._options.shape[1]} options")
            key = record.get("image_id"), record.get("round_id")
            if key not in known or not all(isinstance(x, (int, float)) and x >= 0 for x in values):
                raise UserError(f"{where}: expected a round of {self._path} and shares, found {key} and {values!r:.60}")
            found[key] = values  # type: ignore[index]
        return found
