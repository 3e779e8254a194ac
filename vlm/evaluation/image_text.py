"""Retrieval of texts for images and of images for texts, every image with one or several texts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm.errors import UserError
from vlm.evaluation import retrieval
from vlm.evaluation.embed import Advance, Embedder, Note
from vlm.evaluation.evaluator import Result, Sampling, Task, field, images_key

SHOWN = 5


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """Settings of one retrieval evaluation.

    Attributes:
      data: a source whose examples have an image and one or several texts.
      text: the field with the text or the list of texts.
      captions: use only the first so many texts of an image (COCO and Flickr30k: 5); None uses all.
      language: of the texts, recorded with the numbers.
      group: a field; texts are right for all images with the same value. Without it, an image with another image's
        caption counts as wrong, also where the two captions say the same.
      k: recalls are reported at these depths.
      pictures: queries shown on the HTML page, each way.
    """

    data: dict[str, Any]
    text: str = "text"
    captions: int | None = None
    language: str = ""
    group: str | None = None
    k: tuple[int, ...] = (1, 5, 10)
    bootstrap: Sampling = Sampling()
    pictures: int = 16

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k: expected depths of at least 1, found {self.k}")
        if self.captions is not None and self.captions < 1:
            raise ValueError(f"captions: expected at least 1, found {self.captions}")


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """A prepared retrieval evaluation."""

    config: RetrievalConfig

    @property
    def uses_text(self) -> bool:
        """Whether the model's text tower is needed."""
        return True

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Ranks all texts for every image and all images for every text."""
        images, notes = embedder.all_images(self.source, self.note, advance, images_key(self.config.data, self.source))
        texts = [text for note in notes for text in note["texts"]]
        text_image = np.repeat(np.arange(len(notes)), [len(note["texts"]) for note in notes])
        embeds = embedder.texts(texts)
        groups = np.unique([str(note.get("group", note["index"])) for note in notes], return_inverse=True)[1]
        if self.config.group is None:
            found = retrieval.ranks(images, embeds, text_image)
        else:
            found = retrieval.group_ranks(images, embeds, text_image, groups)
        metrics = retrieval.recall(found, self.config.k)
        shown = np.unique(np.linspace(0, len(notes) - 1, min(self.config.pictures, len(notes))).astype(int))
        details = {
            "language": self.config.language,
            "images": len(notes),
            "texts": len(texts),
            "texts_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            "data_fingerprint": self.source.fingerprint,
        }
        return Result(
            "retrieval",
            metrics,
            self.config.bootstrap.intervals(
                lambda weights: retrieval.recall(found, self.config.k, image_weights=weights), len(notes)
            ),
            n=len(notes),
            unreadable=len(self.source) - len(notes),
            details=details,
            examples=rows_of(notes, found, texts),
            page={
                "source": self.source,
                "queries": queries(
                    shown, notes, texts, found, groups, lambda i: embeds @ images[i], lambda t: images @ embeds[t]
                ),
            },
        )

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key and texts of an example."""
        texts = texts_of(example, self.config.text)
        note: Note = {"key": str(example.get("key")), "texts": texts[: self.config.captions]}
        return note if self.config.group is None else note | {"group": str(field(example, self.config.group))}


def texts_of(example: Mapping[str, Any], name: str) -> list[str]:
    """The text or texts in a field of a raw example.

    Raises:
      UserError: it holds something else, no text, or an empty one.
    """
    value = field(example, name)
    if isinstance(value, (str, bytes)):
        value = [value]
    texts = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [None]
    texts = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        found = f"in {name!r}, found {value!r:.60}"
        raise UserError(f"example {example.get('key')!r}: expected a text or a list of texts {found}")
    return [str(text) for text in texts]


def rows_of(notes: list[Note], found: retrieval.Ranks, texts: list[str]) -> list[dict[str, Any]]:
    """One row per image and one per text: what it is and at which place its first right answer was found."""
    rows: list[dict[str, Any]] = [
        {"query": "image", "index": note["index"], "key": note["key"], "rank": int(rank) + 1}
        for note, rank in zip(notes, found.image_to_text, strict=True)
    ]
    for text, image, rank in zip(texts, found.text_image, found.text_to_image, strict=True):
        note = notes[image]
        rows.append({"query": "text", "text": text, "index": note["index"], "key": note["key"], "rank": int(rank) + 1})
    return rows


def queries(
    shown: np.ndarray,
    notes: list[Note],
    texts: list[str],
    found: retrieval.Ranks,
    groups: np.ndarray,
    of_image: Callable[[int], np.ndarray],
    of_text: Callable[[int], np.ndarray],
) -> dict[str, list[dict[str, Any]]]:
    """The first answers to some queries, each with whether it is right.

    Args:
      shown: numbers of the images to show, each with its first text.
      groups: [I], images and texts of one group belong together.
      of_image, of_text: the scores of all texts for an image, and of all images for a text; -inf where there is none.
    """
    first_text = np.searchsorted(found.text_image, np.arange(len(notes)))
    by_image, by_text = [], []
    for image in shown:
        scores = of_image(int(image))
        best = _distinct([t for t in np.argsort(-scores, kind="stable") if np.isfinite(scores[t])], texts)
        answers = [(texts[t], float(scores[t]), bool(groups[found.text_image[t]] == groups[image])) for t in best]
        by_image.append(
            {"index": notes[image]["index"], "rank": int(found.image_to_text[image]) + 1, "answers": answers}
        )
        text = int(first_text[image])
        scores = of_text(text)
        best = [i for i in np.argsort(-scores, kind="stable")[:SHOWN] if np.isfinite(scores[i])]
        answers = [(notes[i]["index"], float(scores[i]), bool(groups[i] == groups[image])) for i in best]
        by_text.append({"text": texts[text], "rank": int(found.text_to_image[text]) + 1, "answers": answers})
    return {"image_to_text": by_image, "text_to_image": by_text}


def _distinct(order: Sequence[int], texts: list[str]) -> list[int]:
    """The first few texts that differ from the ones before."""
    chosen: dict[str, int] = {}
    for number in order:
        chosen.setdefault(texts[number], int(number))
        if len(chosen) == SHOWN:
            break
    return list(chosen.values())
