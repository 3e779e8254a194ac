"""FLAVA on pictures that two CPU cores can learn: all six losses, compared with random weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    "probe_left/top1": "left digit: linear probe of the class token",
    "probe_larger/top1": "larger digit: linear probe of the class token",
    "probe_single/top1": "single digit: linear probe of the class token",
    "matching/accuracy": "caption right or wrong: matching head",
    "retrieval/text_to_image_recall@1": "picture of a caption: recall@1",
    "retrieval/image_to_text_recall@1": "caption of a picture: recall@1",
}
FALLS = {"contrastive": 2.0, "itm": 0.15, "mmm_image": 2.0, "mmm_text": 3.0, "mim": 2.0, "mlm": 3.0}
"""By how much each held-out loss must end below its start."""
MARKS = {"matching/accuracy": 0.7, "retrieval/text_to_image_recall@1": 0.3}


def digits(output: Path, data_only: bool = False, overrides: Sequence[str] = ()) -> int:
    """Trains all six losses together and reports what is held out, beside the weights that training started from.

    Returns 1 if a result misses its mark. `overrides` (`--config.…`) go to training and evaluation.

    Raises:
      UserError: this is not a checkout with train.py and eval.py, or a step failed.
    """
    steps.check_checkout()
    seconds: dict[str, float] = {}
    steps.say("== data: scenes of two handwritten digits, single digits, sentences, visual words")
    steps.timed(seconds, "data", lambda: _prepare(output))
    if data_only:
        return 0
    steps.say("\n== train: contrastive, matching, and masked modelling of pairs, images and texts")
    config, run = f"--config=configs/flava_digits.py:digits{steps.where(output)}", output / "flava_run"
    command = ["train.py", config, f"--workdir={steps.shown(run)}", *overrides]
    steps.timed(seconds, "train", lambda: steps.python(command))
    steps.say("\n== evaluate: held-out scans, with random weights and with the trained ones")
    found: dict[str, dict[str, float]] = {}
    steps.timed(seconds, "losses", lambda: found.update(_losses(output, run)))
    for name, checkpoint in (("random", output / "flava_random"), ("trained", run)):
        results = steps.shown(output / f"flava_{name}_results.json")
        command = ["eval.py", config, f"--checkpoint={steps.shown(checkpoint)}", f"--output={results}", *overrides]
        line = steps.timed(seconds, f"evaluate {name}", lambda command=command: steps.python(command))
        found[name] |= json.loads(line.strip().splitlines()[-1])
    return _report(output, found, seconds)


def missed(random: Mapping[str, float], trained: Mapping[str, float]) -> list[str]:
    """The losses that fell too little, and the metrics below their marks."""
    low = [name for name, fall in FALLS.items() if not random[name] - trained[name] >= fall]
    return low + [name for name, mark in MARKS.items() if not trained[name] >= mark]


def starts(batch_size: int, words: int) -> dict[str, float]:
    """What each loss is when nothing is known: the logarithm of the number of choices."""
    patches = math.log(visual_words.COUNT)
    tokens = math.log(words)
    return {"contrastive": math.log(batch_size), "itm": math.log(2)} | {
        "mmm_image": patches, "mim": patches, "mmm_text": tokens, "mlm": tokens
    }  # fmt: skip


def table(found: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Loss, ln of the choices, with frequencies alone, random, trained, fall; and metric, random, trained."""
    start, known, random, trained = (found[name] for name in ("start", "frequencies", "random", "trained"))
    rows = []
    for name, title in LOSSES.items():
        numbers = (start[name], known.get(name), random[name], trained[name], random[name] - trained[name])
        rows.append((title, *("" if number is None else f"{number:.2f}" for number in numbers)))
    return rows + [(METRICS[name], "", "", f"{random[name]:.1%}", f"{trained[name]:.1%}", "") for name in METRICS]


def _prepare(output: Path) -> str:
    from vlm.demo.digits import prepare_digits
    from vlm.demo.scenes import prepare_scenes

    return str(prepare_digits(prepare_scenes(output / "scenes"), output / "flava"))


def _losses(output: Path, run: Path) -> dict[str, dict[str, float]]:
    """Held-out losses with random weights, which are saved, and with trained ones; the pictures of the page."""
    import vlm
    from vlm.demo.digits import sources
    from vlm.demo.held_out import HeldOut
    from vlm.demo.page import pictures

    held_out = HeldOut.of(run, {name: [spec] for name, spec in sources(str(output.absolute()), "test").items()})
    shutil.rmtree(output / "flava_random", ignore_errors=True)
    random = held_out.random()
    vlm.save(output / "flava_random", held_out.parts.model, random, held_out.processor)
    _, trained, _ = vlm.load(run)
    content = pictures(held_out, trained, visual_words.read(output / "flava"))
    (output / "flava_pictures.html").write_text(content, encoding="utf-8")
    start = starts(held_out.settings.data.batch_size, held_out.settings.model["text"]["vocab_size"])
    known = held_out.frequencies()
    return {
        "start": start,
        "frequencies": known,
        "random": held_out.losses(random),
        "trained": held_out.losses(trained),
    }


def _report(output: Path, found: dict[str, dict[str, Any]], seconds: dict[str, float]) -> int:
    """Writes the page, says what was reached, prints the JSON line, and returns the exit status."""
    from vlm.demo.page import page

    path, rows, low = output / "flava.html", table(found), missed(found["random"], found["trained"])
    pictures = output / "flava_pictures.html"
    path.write_text(page(rows, pictures.read_text(encoding="utf-8")), encoding="utf-8")
    pictures.unlink()
    for name, *cells in [("held-out", "ln of choices", "frequencies", "random", "trained", "fall"), *rows]:
        steps.say(f"  {name:<44}" + "".join(f"{cell:>14}" for cell in cells))
    for name in low:
        steps.say(f"{name} misses its mark")
    steps.say(f"{steps.summary(seconds)}\n\nPictures and predictions: {path.absolute()}")
    print(json.dumps(found), flush=True)
    return 1 if low else 0
