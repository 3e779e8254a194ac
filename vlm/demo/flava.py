"""FLAVA on pictures that two CPU cores can learn: all six losses, compared with random weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.demo import steps, visual_words

LOSSES = {
    "contrastive": "contrastive (pairs)",
    "itm": "image-text matching (pairs)",
    "mmm_image": "hidden patches, given the caption (pairs)",
    "mmm_text": "hidden words, given the picture (pairs)",
    "mim": "hidden patches (images)",
    "mlm": "hidden words (texts)",
}
METRICS = {
    "probe_left/top1": "digits: linear probe, the left digit of a scene",
    "probe_single/top1": "digits: linear probe, a single digit",
    "matching/accuracy": "digits: caption right or wrong, matching head",
    "retrieval/text_to_image_recall@1": "digits: picture of a caption, recall@1",
    "retrieval/image_to_text_recall@1": "digits: caption of a picture, recall@1",
    "matching_nlvr/accuracy": "nlvr: sentence right or wrong, matching head",
    "retrieval_nlvr/text_to_image_recall@5": "nlvr: scene of a sentence, recall@5",
    "retrieval_nlvr/image_to_text_recall@5": "nlvr: sentence of a scene, recall@5",
}
KINDS = {"digits": "scenes of handwritten digits", "nlvr": "NLVR's drawn scenes"}
FALLS = {
    "digits": {"contrastive": 1.5, "itm": 0.1, "mmm_image": 2.0, "mmm_text": 3.0, "mim": 1.5, "mlm": 3.0},
    "nlvr": {"itm": 0.03, "mmm_image": 2.0, "mmm_text": 2.0, "mim": 2.0, "mlm": 2.0},
}
"""By how much each loss must end below its start, on held-out data of each kind. None for the contrastive loss of NLVR:
a sentence is true of many scenes, so which of them it was written for cannot be learned.
"""
MARKS = {"matching/accuracy": 0.6, "retrieval/text_to_image_recall@1": 0.3}
GAINS = {"probe_single/top1": 0.1}
"""By how much a linear probe must be better than that of random weights."""


class Story(NamedTuple):
    """What is trained, where: below `output`, on NLVR's scenes from `source` too, unless it is None."""

    output: Path
    source: Path | None = None
    seed: int = 0

    @property
    def variant(self) -> str:
        """Of the configuration."""
        return "digits" if self.source is None else "nlvr"

    @property
    def kinds(self) -> list[str]:
        """Of held-out data."""
        return ["digits"] if self.source is None else list(KINDS)

    def path(self, name: str) -> Path:
        """A file or folder of this run; those of other variants and seeds lie beside it."""
        seed = f"_{self.seed}" if self.seed else ""
        return self.output / f"flava_{self.variant}{seed}{name}"


def train(story: Story, data_only: bool = False, overrides: Sequence[str] = ()) -> int:
    """Trains all six losses together and reports what is held out, beside the weights that training started from.

    Returns 1 if a result misses its mark. `overrides` (`--config.…`) go to training, those of `eval` to eval.py too.

    Raises:
      UserError: this is not a checkout with train.py and eval.py, there are no scenes at `source`, or a step failed.
    """
    steps.check_checkout()
    seconds: dict[str, float] = {}
    steps.say("== data: scenes of two handwritten digits, single digits, sentences, visual words")
    if story.source is None:
        steps.say("   digits only; --nlvr=DIR adds NLVR's drawn scenes and people's sentences about them")
    steps.timed(seconds, "data", lambda: _prepare(story))
    if data_only:
        return 0
    steps.say("\n== train: contrastive, matching, and masked modelling of pairs, images and texts")
    config, run = f"--config=configs/flava_digits.py:{story.variant}{steps.where(story.output)}", story.path("_run")
    seeds = [f"--config.train.seed={story.seed}", f"--config.data.seed={story.seed}"] if story.seed else []
    command = ["train.py", config, f"--workdir={steps.shown(run)}", *seeds, *overrides]
    steps.timed(seconds, "train", lambda: steps.python(command))
    steps.say("\n== evaluate: held-out data, with random weights and with the trained ones")
    found: dict[str, dict[str, float]] = {}
    steps.timed(seconds, "losses", lambda: found.update(_losses(story)))
    for name, checkpoint in (("random", story.path("_random")), ("trained", run)):
        results = steps.shown(story.path(f"_{name}_results.json"))
        command = ["eval.py", config, f"--checkpoint={steps.shown(checkpoint)}", f"--output={results}"]
        command += [override for override in overrides if override.startswith("--config.eval.")]
        line = steps.timed(seconds, f"evaluate {name}", lambda command=command: steps.python(command))
        found[name] |= json.loads(line.strip().splitlines()[-1])
    return _report(story, found, seconds)


def missed(kinds: Sequence[str], random: Mapping[str, float], trained: Mapping[str, float]) -> list[str]:
    """The losses that fell too little, and the metrics below their marks."""
    falls = {f"{kind}/{name}": fall for kind in kinds for name, fall in FALLS[kind].items()}
    low = [name for name, fall in falls.items() if not random[name] - trained[name] >= fall]
    low += [name for name, gain in GAINS.items() if not trained[name] - random[name] >= gain]
    return low + [name for name, mark in MARKS.items() if name in trained and not trained[name] >= mark]


def starts(batch_size: int, words: int) -> dict[str, float]:
    """What each loss is when nothing is known: the logarithm of the number of choices."""
    patches = math.log(visual_words.COUNT)
    tokens = math.log(words)
    return {"contrastive": math.log(batch_size), "itm": math.log(2)} | {
        "mmm_image": patches, "mim": patches, "mmm_text": tokens, "mlm": tokens
    }  # fmt: skip


def table(kinds: Sequence[str], found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Loss, ln of the choices, with frequencies alone, random, trained, fall, mark; and metric, random, trained."""
    start, known, random, trained = (found[name] for name in ("start", "frequencies", "random", "trained"))
    rows = []
    for kind in kinds:
        for loss, title in LOSSES.items():
            name = f"{kind}/{loss}"
            numbers = (start[loss], known.get(name), random[name], trained[name], random[name] - trained[name])
            cells = ["" if number is None else f"{number:.2f}" for number in numbers]
            rows.append((f"{kind}: {title}", *cells, f"{FALLS[kind][loss]:g}" if loss in FALLS[kind] else ""))
    for name, title in METRICS.items():
        if name in trained:
            mark = f"{MARKS[name]:.0%}" if name in MARKS else f"+{GAINS[name]:.0%}" if name in GAINS else ""
            gain = f"{trained[name] - random[name]:+.1%}"
            rows.append((title, "", "", f"{random[name]:.1%}", f"{trained[name]:.1%}", gain, mark))
    return rows


def _prepare(story: Story) -> str:
    from vlm.demo import digits, nlvr, nlvr_pairs
    from vlm.demo.scenes import prepare_scenes

    output, vocabulary = story.output, digits.vocabulary()
    folders = [prepare_scenes(output / "scenes")]
    folders.append(digits.prepare_digits(folders[0], output / "flava"))
    if story.source is not None:
        folders.append(nlvr_pairs.prepare_pairs(story.source, output / "nlvr_pairs"))
        words = " ".join(word for word in vocabulary if not word.startswith("["))
        vocabulary = nlvr.vocabulary([words, *nlvr_pairs.texts(folders[-1])])
    return str(visual_words.prepare_words(output / f"words_{story.variant}", folders, vocabulary))


def _losses(story: Story) -> dict[str, dict[str, float]]:
    """Held-out losses with random weights, which are saved, and with trained ones; the pictures of the page."""
    import vlm
    from vlm.demo import digits, nlvr_pairs
    from vlm.demo.held_out import HeldOut, frequencies
    from vlm.demo.page import pictures

    held_out = HeldOut.of(story.path("_run"))
    shutil.rmtree(story.path("_random"), ignore_errors=True)
    random = held_out.random()
    vlm.save(story.path("_random"), held_out.parts.model, random, held_out.processor)
    _, trained, _ = vlm.load(story.path("_run"))
    settings, output = held_out.settings, story.output.absolute()
    found: dict[str, dict[str, float]] = {"frequencies": {}, "random": {}, "trained": {}}
    found["start"] = starts(settings.data.batch_size, settings.model["text"]["vocab_size"])
    means, content = visual_words.read(output / f"words_{story.variant}"), []
    for kind in story.kinds:
        digital = kind == "digits"
        sources = digits.sources(str(output), "test") if digital else nlvr_pairs.sources(f"{output}/nlvr_pairs", "test")
        streams = held_out.batches(sources)
        content.append(pictures(held_out, trained, streams, means, KINDS[kind]))
        losses = {"random": held_out.losses(random, streams), "trained": held_out.losses(trained, streams)}
        for name, values in (losses | {"frequencies": frequencies(streams)}).items():
            found[name] |= {f"{kind}/{loss}": value for loss, value in values.items()}
    story.path("_pictures.html").write_text("\n".join(content), encoding="utf-8")
    return found


def _report(story: Story, found: dict[str, dict[str, Any]], seconds: dict[str, float]) -> int:
    """Writes the page, says what was reached, prints the JSON line, and returns the exit status."""
    from vlm.demo.page import HEAD, page

    path, pictures = story.path(".html"), story.path("_pictures.html")
    rows, low = table(story.kinds, found), missed(story.kinds, found["random"], found["trained"])
    path.write_text(page(rows, pictures.read_text(encoding="utf-8")), encoding="utf-8")
    pictures.unlink()
    for name, *cells in [HEAD, *rows]:
        steps.say(f"  {name:<54}" + "".join(f"{cell:>14}" for cell in cells))
    for name in low:
        steps.say(f"{name} misses its mark")
    steps.say(f"{steps.summary(seconds)}\n\nPictures and predictions: {path.absolute()}")
    print(json.dumps(found), flush=True)
    return 1 if low else 0
