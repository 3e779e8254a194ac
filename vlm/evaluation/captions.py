"""Captioning: one generated text per image, scored against people's (Chen et al. 2015; Agrawal et al. 2019, NoCaps)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from vlm.data.text import clean_caption
from vlm.evaluation.embed import Embedder
from vlm.evaluation.evaluator import Result, Sampling, Task, field
from vlm.evaluation.feed import Advance, Note, pictures_of
from vlm.evaluation.image_text import texts_of
from vlm.evaluation.metrics import captions as scores
from vlm.evaluation.metrics import files
from vlm.evaluation.writing import Writer, check_writes, generation_config, prompt_rows
from vlm.generation import GenerationConfig

MAX_WORDS = 1 << 20


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
    """Settings of one captioning evaluation.

    Attributes:
      data: a source whose examples have an image and, to be scored, a caption or several.
      captions: the field with them; None: captions are written and not scored (test sets).
      image_id: the field with a number, or a file name that ends in one; None: `image_id` or `img_id` where there is
        one, otherwise the image's file (`vlm.evaluation.metrics.files.image_ids`), otherwise the position. Examples
        with one id are one image with the captions of all.
      domain: the field with NoCaps' domain ("in-domain", …); scores are then also given for each.
      prompt: what captions begin with, not part of them; None: what the processor was trained with; "": nothing.
      preset: how to generate, as published for COCO or NoCaps, or "greedy"; see `vlm.evaluation.writing.PRESETS`.
      generation: fields of `GenerationConfig` in place of the preset's.
      metrics: of "bleu", "rouge_l", "cider", "meteor", "spice".
      pictures: examples shown on the HTML page.
    """

    data: dict[str, Any]
    captions: str | None = "caption"
    image_id: str | None = None
    domain: str | None = None
    prompt: str | None = None
    preset: Literal["coco", "nocaps", "greedy"] = "coco"
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: tuple[str, ...] = scores.DEFAULT
    language: str = ""
    bootstrap: Sampling = Sampling()
    pictures: int = 48

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in scores.CHOICES]
        if unknown:
            raise ValueError(f"metrics: expected some of {', '.join(scores.CHOICES)}, found {unknown[0]!r}")
        if self.domain is not None and self.captions is None:
            raise ValueError("domain: expected captions to score as well")


@dataclasses.dataclass(frozen=True)
class Captions(Task):
    """A prepared captioning evaluation."""

    config: CaptionsConfig
    generation: GenerationConfig

    @classmethod
    def prepare(cls, config: CaptionsConfig, path: str, limit: int | None = None) -> Captions:
        """Opens the data, looks at its first captions and builds the generation settings.

        Raises:
          UserError: one of them is wrong.
        """
        generation = generation_config(config.preset, config.generation, f"{path}.generation")
        return cls._open(config, path, limit, generation)

    def check(self, embedder: Embedder) -> None:
        """Traces the model; raises UserError where it cannot caption."""
        check_writes(embedder, self._prompt(embedder.processor, 1))

    def __call__(self, embedder: Embedder, advance: Advance | None = None) -> Result:
        """Captions every image."""
        writer, feed, processor = Writer.of(embedder, self.generation), embedder.feed, embedder.processor
        prompt = self._prompt(processor, feed.rows)
        written: list[str] = []
        notes: list[Note] = []
        for fed in feed.examples(self.source, lambda e: pixels(processor, e), self.note, advance):
            texts = writer(feed.put(fed.local) | prompt)
            written += [texts[row] for row in fed.valid]
            notes += fed.notes
        return self._result(notes, written)

    def note(self, example: Mapping[str, Any]) -> Note:
        """Key, image id, captions and domain of an example."""
        config = self.config
        note: Note = {"key": str(example.get("key"))}
        where = f"example {example.get('key')!r}"
        if config.image_id is not None:
            note["image_id"] = files.image_number(field(example, config.image_id), where)
        elif (own := files.own_id(example, where)) is not None:
            note["image_id"] = own
        elif "image_file" in example:
            note["image_file"] = str(example["image_file"])
        if config.captions is not None:
            note["captions"] = texts_of(example, config.captions)
        return note if config.domain is None else note | {"domain": str(field(example, config.domain))}

    def _prompt(self, processor: Any, rows: int) -> dict[str, np.ndarray]:
        own = getattr(getattr(processor, "config", None), "prompt", "")
        return prompt_rows(processor, own if self.config.prompt is None else self.config.prompt, rows)

    def _result(self, notes: list[Note], written: list[str]) -> Result:
        by_id: dict[Any, Note] = {}
        named = files.image_ids(note["image_file"] for note in notes if "image_file" in note)
        for note, text in zip(notes, written, strict=True):
            image = note.get("image_id", named.get(note.get("image_file", ""), note["index"]))
            first = by_id.setdefault(image, note | {"caption": text, "captions": []})
            first["captions"] = [*first["captions"], *note.get("captions", ())]
        rows = [{"image_id": image, **row} for image, row in by_id.items()]
        details = {
            "data_fingerprint": self.source.fingerprint,
            "generation": dataclasses.asdict(self.generation),
            "language": self.config.language,
        }
        metrics, intervals = self._score(by_id, rows) if self.config.captions is not None else ({}, {})
        cards = [
            {"index": row["index"], "said": row["caption"], "wanted": row["captions"], "correct": row.get("correct")}
            for row in rows
        ]
        return Result(
            "captions",
            metrics,
            intervals,
            n=len(rows),
            unreadable=len(self.source) - len(notes),
            details=details,
            examples=rows,
            page={"source": self.source, "cards": cards, "pictures": self.config.pictures},
            official=[{"image_id": image, "caption": row["caption"]} for image, row in by_id.items()],
        )

    def _score(self, by_id: Mapping[Any, Note], rows: list[dict[str, Any]]) -> tuple[dict[str, float], Any]:
        """Adds each image's scores to its row; returns all images' scores and their intervals."""
        captions = {image: row["caption"] for image, row in by_id.items()}
        references = {image: row["captions"] for image, row in by_id.items()}
        if self.config.domain is None:
            parts = {"overall": scores.score(captions, references, self.config.metrics)}
        else:
            domains = {image: row["domain"] for image, row in by_id.items()}
            parts = scores.score_domains(captions, references, domains, self.config.metrics)
        overall = parts.pop("overall")
        place = {image: number for number, image in enumerate(overall.ids)}
        for row in rows:
            each = {name: float(values[place[row["image_id"]]]) for name, values in overall.per_image.items()}
            row |= {"correct": _plain(row["caption"]) in map(_plain, row["captions"]), "scores": each}
        exact = np.array([row["correct"] for row in rows], np.float64)
        metrics = dict(overall.metrics) | {"exact_match": float(exact.mean())}
        metrics |= {f"{name}/{key}": value for name, part in parts.items() for key, value in part.metrics.items()}
        # BLEU is a ratio of sums over all images; of the others the mean over images is what is resampled.
        means = {name: values for name, values in overall.per_image.items() if not name.startswith("bleu")}
        means |= {"exact_match": exact}
        intervals = self.config.bootstrap.intervals(
            lambda counts: {name: float(np.average(values, weights=counts)) for name, values in means.items()},
            len(rows),
        )
        return metrics, intervals


def _plain(text: str) -> str:
    return clean_caption(text, MAX_WORDS)


def pixels(processor: Any, example: dict[str, Any]) -> dict[str, np.ndarray]:
    """The pixels of an example, without batch axis: a transform for `Feed.examples`."""
    return {"image": np.asarray(processor(images=[pictures_of(example)])["image"][0])}
