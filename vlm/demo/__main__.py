"""`make demo`: prepares real handwritten digits, trains AltCLIP in its three stages, evaluates, shows the result.

    python -m vlm.demo --output=demo_output
    python -m vlm.demo blip                      two handwritten digits: captions, questions and answers
    python -m vlm.demo nlvr --nlvr=FOLDER        true or false: people's sentences about drawn scenes
    python -m vlm.demo flava [--nlvr=FOLDER]     six losses on pairs, pictures and texts, beside random weights

Every step is one of the commands that a run on a pod consists of; they are printed as they run. The last line on
standard output is the JSON line of eval.py, everything else goes to standard error. What is complete is kept: the same
command goes on where an earlier one stopped. Exit status 1 if an accuracy misses its mark.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm.demo import blip, flava, steps
from vlm.demo.phrases import LANGUAGES
from vlm.errors import Parser, UserError, exit_on_user_error

STAGES = {
    "clip": "a small CLIP learns from English captions",
    "teacher": "a multilingual text tower learns from CLIP's, on parallel sentences",
    "contrastive": "the multilingual tower is tuned on pictures with captions in all languages",
}
MARKS = {code: 0.95 if code == "en" else 0.90 for code in LANGUAGES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(prog="python -m vlm.demo", description=__doc__)
    parser.add_argument("story", nargs="?", default="altclip", choices=("altclip", "blip", "nlvr", "flava"))
    parser.add_argument("--output", metavar="DIR", default=steps.DEFAULT_OUTPUT, help="where everything goes")
    parser.add_argument("--data_only", action="store_true", help="prepare the data and stop")
    parser.add_argument("--nlvr", metavar="DIR", help="NLVR's archives of scenes (stories nlvr and flava)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of what is drawn (story flava)")
    with exit_on_user_error():
        options = parser.parse_args(argv)
        if options.nlvr is None and options.story == "nlvr":
            raise UserError("the story nlvr needs --nlvr=DIR, the folder of NLVR's scenes")
        if options.nlvr is not None and options.story not in ("nlvr", "flava"):
            raise UserError("--nlvr=DIR names NLVR's scenes and goes with the stories nlvr and flava")
        if options.seed and options.story != "flava":
            raise UserError("--seed goes with the story flava")
        output = Path(options.output)
        if options.story == "blip":
            return blip.digits(output, options.data_only)
        if options.story == "flava":
            source = options.nlvr and Path(options.nlvr)
            return flava.train(flava.Story(output, source, options.seed), options.data_only)
        if options.story == "nlvr" and options.nlvr is not None:
            return blip.nlvr(output, Path(options.nlvr), options.data_only)
        return run(output, options.data_only)


def run(output: Path, data_only: bool = False, overrides: Sequence[str] = ()) -> int:
    """All of AltCLIP's steps; `overrides` (`--config.…`) go to every training run.

    Raises:
      UserError: this is not a checkout with train.py and eval.py, or a step failed.
    """
    steps.check_checkout()
    seconds: dict[str, float] = {}
    steps.timed(seconds, "data", lambda: _prepare(output))
    if data_only:
        return 0
    where = steps.where(output)
    for stage, story in STAGES.items():
        steps.say(f"\n== {stage}: {story}")
        command = ["train.py", f"--config=configs/digits.py:{stage}{where}", f"--workdir={steps.shown(output / stage)}"]
        steps.timed(seconds, stage, lambda command=command: steps.python([*command, *overrides]))
    steps.say("\n== evaluate: held-out scans, zero-shot, in every language")
    page = output / "results.html"
    command = ["eval.py", f"--config=configs/digits.py:contrastive{where}"]
    command += [f"--checkpoint={steps.shown(output / 'contrastive')}"]
    command += [f"--output={steps.shown(page.with_suffix('.json'))}"]
    line = steps.timed(seconds, "evaluate", lambda: steps.python(command)).strip().splitlines()[-1]
    steps.say(f"\n{report(json.loads(line), seconds)}\n\nPictures and predictions: {page.absolute()}\n")
    print(line, flush=True)
    return 0 if not missed(json.loads(line)) else 1


def missed(metrics: dict[str, float]) -> list[str]:
    """Languages whose zero-shot accuracy is below its mark."""
    return [code for code, mark in MARKS.items() if metrics[f"zero_shot_{code}/top1"] < mark]


def report(metrics: dict[str, float], seconds: dict[str, float]) -> str:
    """Accuracies by language and the time each step took, as a table."""
    lines = ["zero-shot accuracy on scans that no stage has seen (chance: 10 %)"]
    for code, language in LANGUAGES.items():
        accuracy, low = metrics[f"zero_shot_{code}/top1"], code in missed(metrics)
        note = f"   below {MARKS[code]:.0%}" if low else ""
        lines.append(f"  {language.name:<10}{accuracy:7.1%}   {language.phrases[0].format(c=language.words[7])}{note}")
    return "\n".join([*lines, steps.summary(seconds)])


def _prepare(output: Path) -> None:
    from vlm.demo.prepare import prepare

    output.mkdir(parents=True, exist_ok=True)
    steps.say("== data: the UCI handwritten digits, sentences about them, tokenizers")
    steps.say(f"   {prepare(output / 'data')}")


if __name__ == "__main__":
    sys.exit(main())
