"""`make demo`: prepares real handwritten digits, trains AltCLIP in its three stages, evaluates, shows the result.

    python -m vlm.demo --output=demo_output

Every step is one of the commands that a run on a pod consists of; they are printed as they run. The last line on
standard output is the JSON line of eval.py, everything else goes to standard error. What is complete is kept: the same
command goes on where an earlier one stopped. Exit status 1 if an accuracy misses its mark.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import vlm
from vlm.demo.phrases import LANGUAGES
from vlm.errors import Parser, UserError, exit_on_user_error

ROOT = Path(vlm.__file__).resolve().parents[1]
DEFAULT_OUTPUT = "demo_output"
STAGES = {
    "clip": "a small CLIP learns from English captions",
    "teacher": "a multilingual text tower learns from CLIP's, on parallel sentences",
    "contrastive": "the multilingual tower is tuned on pictures with captions in all languages",
}
MARKS = {code: 0.95 if code == "en" else 0.90 for code in LANGUAGES}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(prog="python -m vlm.demo", description=__doc__)
    parser.add_argument("--output", metavar="DIR", default=DEFAULT_OUTPUT, help="where everything goes")
    parser.add_argument("--data_only", action="store_true", help="prepare the data and stop")
    with exit_on_user_error():
        options = parser.parse_args(argv)
        return run(Path(options.output), options.data_only)


def run(output: Path, data_only: bool = False, overrides: Sequence[str] = ()) -> int:
    """All steps; `overrides` (`--config.…`) go to every training run.

    Raises:
      UserError: this is not a checkout with train.py and eval.py, or a step failed.
    """
    if not (ROOT / "train.py").is_file():
        raise UserError(f"the demonstration runs train.py of a checkout, and {ROOT} has none")
    seconds: dict[str, float] = {}
    _timed(seconds, "data", lambda: _prepare(output))
    if data_only:
        return 0
    where = "" if str(output) == DEFAULT_OUTPUT and Path.cwd() == ROOT else f",{output.absolute()}"
    for stage, story in STAGES.items():
        _say(f"\n== {stage}: {story}")
        command = ["train.py", f"--config=configs/digits.py:{stage}{where}", f"--workdir={_shown(output / stage)}"]
        _timed(seconds, stage, lambda command=command: _python([*command, *overrides]))
    _say("\n== evaluate: held-out scans, zero-shot, in every language")
    page = output / "results.html"
    command = ["eval.py", f"--config=configs/digits.py:contrastive{where}"]
    command += [f"--checkpoint={_shown(output / 'contrastive')}", f"--output={_shown(page.with_suffix('.json'))}"]
    line = _timed(seconds, "evaluate", lambda: _python(command)).strip().splitlines()[-1]
    _say(f"\n{report(json.loads(line), seconds)}\n\nPictures and predictions: {page.absolute()}\n")
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
    total = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return "\n".join([*lines, f"seconds: {parts}; together {total:.0f}"])


def _prepare(output: Path) -> None:
    from vlm.demo.prepare import prepare

    _say("== data: the UCI handwritten digits, sentences about them, tokenizers")
    output.mkdir(parents=True, exist_ok=True)
    _say(f"   {prepare(output / 'data')}")


def _python(command: Sequence[str]) -> str:
    """Runs a script of the checkout and returns its standard output.

    Raises:
      UserError: it failed; its own message has gone to standard error.
    """
    _say(f"$ python {shlex.join(command)}")
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{command[0]} ended with status {done.returncode}, see above")
    return done.stdout


def _timed(seconds: dict[str, float], name: str, step: Callable[[], str | None]) -> str:
    began = time.monotonic()
    result = step() or ""
    seconds[name] = time.monotonic() - began
    return result


def _shown(path: Path) -> str:
    """A path as the scripts, which run in the checkout, need it."""
    return str(path) if Path.cwd() == ROOT else str(path.absolute())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
