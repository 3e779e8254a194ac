"""Scores of captions, tokenised as the official tool does: BLEU 1-4, ROUGE-L, CIDEr; METEOR and SPICE with Java."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm.errors import UserError, did_you_mean
from vlm.evaluation.metrics import java
from vlm.evaluation.metrics.bleu import bleu
from vlm.evaluation.metrics.cider import cider
from vlm.evaluation.metrics.ngrams import MAX_N
from vlm.evaluation.metrics.ptb import tokenize
from vlm.evaluation.metrics.rouge import rouge_l

DEFAULT = ("bleu", "rouge_l", "cider")
CHOICES = (*DEFAULT, "meteor", "spice")
DOMAINS = {"in-domain": "in", "near-domain": "near", "out-domain": "out"}


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Attributes:
    metrics: of all captions together, `bleu_1` … `bleu_4`, `rouge_l`, `cider`, `meteor`, `spice`.
    per_image: the same of every image, in the order of `ids`.
    ids: the images.
    """

    metrics: dict[str, float]
    per_image: dict[str, Float[np.ndarray, " i"]]
    ids: tuple[Any, ...]


def score(
    captions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    metrics: Sequence[str] = DEFAULT,
) -> CaptionScores:
    """Scores one caption per image against its references; the images are those of `captions`.

    The order is that of `references`. CIDEr depends on which images are scored together (see `cider`).

    Raises:
      UserError: no captions, an image without references, an unknown metric, or one whose tool is not installed.
    """
    for name in metrics:
        if name not in CHOICES:
            raise UserError(f"metrics: no caption metric {name!r}{did_you_mean(name, CHOICES)}")
    if not captions:
        raise UserError("captions: nothing to score")
    bare = [image for image in captions if not references.get(image)]
    if bare:
        raise UserError(f"captions: {len(bare)} images have no reference caption, the first is {bare[0]!r}")
    ids = tuple(image for image in references if image in captions)
    hypotheses = tokenize([captions[image] for image in ids])
    flat = iter(tokenize([reference for image in ids for reference in references[image]]))
    tokenized = [[next(flat) for _ in references[image]] for image in ids]
    total: dict[str, float] = {}
    per_image: dict[str, np.ndarray] = {}
    for name in metrics:
        if name == "bleu":
            corpus, each = bleu(hypotheses, tokenized)
            total |= {f"bleu_{n + 1}": float(corpus[n]) for n in range(MAX_N)}
            per_image |= {f"bleu_{n + 1}": each[n] for n in range(MAX_N)}
            continue
        if name in ("meteor", "spice"):
            total[name], per_image[name] = java.run(name, hypotheses, tokenized)
            continue
        per_image[name] = (rouge_l if name == "rouge_l" else cider)(hypotheses, tokenized)
        total[name] = float(per_image[name].mean())
    return CaptionScores(total, per_image, ids)


def score_domains(
    captions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    domains: Mapping[Any, str],
    metrics: Sequence[str] = DEFAULT,
) -> dict[str, CaptionScores]:
    """Scores each domain by itself and all together, as NoCaps reports.

    CIDEr's document frequencies are each domain's own.

    Args:
      domains: domain of each image; `in-domain`, `near-domain` and `out-domain` become `in`, `near` and `out`.

    Returns:
      {"in": …, "near": …, "out": …, "overall": …}; domains without captions are left out.
    """
    found: dict[str, CaptionScores] = {}
    names = {DOMAINS.get(domain, domain) for domain in domains.values()}
    for name in sorted(names, key=lambda name: (name not in DOMAINS.values(), name)):
        part = {i: text for i, text in captions.items() if i in domains and DOMAINS.get(domains[i], domains[i]) == name}
        if part:
            found[name] = score(part, references, metrics)
    return found | {"overall": score(captions, references, metrics)}
