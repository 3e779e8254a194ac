"""BLIP on pictures that two CPU cores can learn: two handwritten digits, and NLVR's drawn scenes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm.demo import steps

MARKS = {"captions/exact_match": 0.9, "vqa/accuracy": 0.9, "vqa_ranked/accuracy": 0.9}
"""Shares: captions that equal the reference, and VQA's accuracy. NLVR's demonstration has no mark."""
STORIES = {
    "digits_caption": "a captioner learns to say which digits a scene shows",
    "digits_vqa": "a model learns to answer questions about the digits",
}


def digits(output: Path, data_only: bool = False, overrides: Sequence[str] = ()) -> int:
    """Two-digit scenes: trains and evaluates a captioner, then a question-answering model.

    Returns 1 if a result misses its mark. `overrides` (`--config.…`) go to every training run.

    Raises:
      UserError: this is not a checkout with train.py and eval.py, or a step failed.
    """
    from vlm.demo.scenes import prepare_scenes

    steps.check_checkout()
    seconds: dict[str, float] = {}
    steps.say("== data: scenes of two of the UCI handwritten digits, captions, questions and answers")
    steps.timed(seconds, "data", lambda: str(prepare_scenes(output / "scenes")))
    metrics: dict[str, float] = {}
    for name, story in () if data_only else STORIES.items():
        metrics |= _train_and_evaluate(output, name, story, seconds, ("--config.eval={}", *overrides))
    return 0 if data_only else _report(metrics, seconds, MARKS)


def nlvr(output: Path, source: Path, data_only: bool = False, overrides: Sequence[str] = ()) -> int:
    """NLVR: trains a matching model on sentences about drawn scenes and says how often it is right on others.

    Raises:
      UserError: `source` has no scenes, this is not a checkout, or a step failed.
    """
    from vlm.demo.nlvr import prepare_nlvr

    steps.check_checkout()
    seconds: dict[str, float] = {}
    steps.say("== data: NLVR's scenes, people's sentences in all colourings, and generated statements")
    steps.timed(seconds, "data", lambda: str(prepare_nlvr(source, output / "nlvr")))
    if data_only:
        return 0
    _train(output, "nlvr_caption", "pretraining: the scenes described", seconds, overrides)
    _train(output, "nlvr_simple", "true or false, of the simplest statements", seconds, overrides)
    story = "true or false, learned from 600 people's sentences and from generated ones"
    return _report(_train_and_evaluate(output, "nlvr_tiny", story, seconds, overrides), seconds, {})


def _train(output: Path, name: str, story: str, seconds: dict[str, float], overrides: Sequence[str]) -> tuple[str, str]:
    """Returns the run's configuration and workdir, as arguments."""
    steps.say(f"\n== {name}: {story}")
    config, workdir = f"--config=configs/blip.py:{name}{steps.where(output)}", steps.shown(output / name)
    command = ["train.py", config, f"--workdir={workdir}", *overrides]
    steps.timed(seconds, name, lambda: steps.python(command))
    return config, workdir


def _train_and_evaluate(
    output: Path, name: str, story: str, seconds: dict[str, float], overrides: Sequence[str]
) -> dict[str, float]:
    config, workdir = _train(output, name, story, seconds, overrides)
    results = output / f"{name}_results.json"
    command = ["eval.py", config, f"--checkpoint={workdir}", f"--output={steps.shown(results)}"]
    line = steps.timed(seconds, f"evaluate {name}", lambda: steps.python(command)).strip().splitlines()[-1]
    steps.say(f"pictures and predictions: {results.with_suffix('.html').absolute()}")
    return json.loads(line)


def missed(metrics: Mapping[str, float], marks: Mapping[str, float]) -> list[str]:
    """The metrics that do not reach their marks; one that is not a number does not either."""
    return [name for name, mark in marks.items() if not metrics[name] >= mark]


def _report(metrics: dict[str, float], seconds: dict[str, float], marks: Mapping[str, float]) -> int:
    """Says what was reached, prints the JSON line, and returns the exit status."""
    low = missed(metrics, marks)
    for name in low:
        steps.say(f"{name} is {metrics[name]:.4g}, below {marks[name]:g}")
    steps.say(steps.summary(seconds))
    print(json.dumps(metrics), flush=True)
    return 1 if low else 0
