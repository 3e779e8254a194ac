"""What a run reports: metrics.jsonl and TensorBoard, rates and utilisation, one line or bar of progress."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from vlm.errors import UserError
from vlm.flops import StepFlops
from vlm.manifest import write_atomically

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id"
REPORT_SECONDS = 10.0
"""Between two lines of `Progress.moved`."""


class MetricsWriter:
    """Appends metrics of steps to `metrics.jsonl` (one JSON object a line), TensorBoard and, if asked, wandb.

    After a restart at `start_step`, lines of later steps (which will be run again) and a torn last line are dropped
    first. A metric that is not finite is written as null.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int = 0,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self._wandb = _start_wandb(wandb, workdir, config) if wandb else None
        path = workdir / METRICS
        _drop_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one step; the line outlives this process when this returns, not a power failure.

        Raises:
          OSError: the disk is full, for instance.
        """
        clean = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3)} | clean) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in clean.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(clean, step=step)

    def close(self) -> None:
        """Flushes and closes every destination."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept).encode())


def _start_wandb(project: str, workdir: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("config.train.wandb needs the extra: pip install 'vlm[wandb]'") from None
    file = workdir / WANDB_ID  # a run that is started again goes on as the same one
    if not file.exists():
        write_atomically(file, secrets.token_hex(4).encode())
    run = file.read_text().strip()
    return wandb.init(project=project, dir=str(workdir), config=dict(config or {}), id=run, resume="allow")


@dataclasses.dataclass
class Rates:
    """Speed between two reports.

    Attributes:
      examples: examples per step, all hosts.
      peak: FLOP/s of all devices together at best; None when unknown, and then no utilisation is reported.
    """

    examples: int
    peak: float | None
    _began: float = dataclasses.field(default_factory=lambda: time.monotonic())
    _steps: int = 0
    _tokens: float = 0.0
    _waited: float = 0.0
    _flops: float = 0.0

    def step(self, tokens: float, waited: float, flops: float) -> None:
        """Counts a finished step: its real (unpadded) tokens, seconds waited for data, model FLOPs."""
        self._steps += 1
        self._tokens += tokens
        self._waited += waited
        self._flops += flops

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else than steps (evaluation, a blocking save)."""
        self._began += seconds

    def report(self) -> dict[str, float]:
        """Rates since the last report, which starts the next interval."""
        now = time.monotonic()
        seconds, steps = max(now - self._began, 1e-9), self._steps
        values = {
            "steps_per_second": steps / seconds,
            "examples_per_second": steps * self.examples / seconds,
            "data_wait_share": min(1.0, self._waited / seconds),
            "model_tflops_per_second": self._flops / seconds / 1e12,
        }
        if self._tokens:
            values["tokens_per_second"] = self._tokens / seconds
        if self.peak:
            values["mfu"] = self._flops / seconds / self.peak
        self._began, self._steps, self._tokens, self._waited, self._flops = now, 0, 0.0, 0.0, 0.0
        return values


class Progress:
    """A bar on a terminal, otherwise one plain line per report."""

    def __init__(
        self, steps: int, start: int = 0, stream: TextIO | None = None, enabled: bool = True, unit: str = "step"
    ):
        self._steps, self._start = steps, start
        self._began = self._reported = time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._enabled, self._bar, self._unit = enabled, None, unit
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, file=self._stream, dynamic_ncols=True, unit=unit)

    def advance(self, step: int) -> None:
        """Moves the bar to `step` finished steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def moved(self, step: int, examples: float | None = None) -> None:
        """Moves the bar; now and then, and at the end, shows how many examples a second there were.

        Args:
          step: finished steps. examples: since the beginning, where a step is something else.
        """
        self.advance(step)
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS or step == self._steps:
            self._reported = now
            done = step - self._start if examples is None else examples
            self.report(step, {"examples_per_second": done / max(now - self._began, 1e-9)})

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the metrics of `step`."""
        if self._bar is not None:
            self._bar.set_postfix_str(" | ".join(_parts(values)))
        elif self._enabled:
            seconds = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._steps - step)
            self.say(" | ".join([f"{self._unit} {step}/{self._steps}", *_parts(values), f"eta {duration(seconds)}"]))

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._enabled:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


class Report:
    """Collects the metrics of steps as they finish and passes them on, without making the device wait.

    A step's metrics are read when `LAG` more steps have been dispatched. So the host never runs further ahead than
    that, and a run of bad steps is noticed as soon as it is long enough. Every `log_every`-th step is logged, and the
    last one.

    With `streams` (finished steps -> {stream: how many were of it}), whose steps have different metrics, a metric that
    is logged is the mean over the steps since the last report that had it and were finite; `steps/<stream>` are added.
    """

    LAG = 2
    OF_THE_STEP = ("learning_rate", "param_norm", "bad_steps", "bad_steps_in_a_row")

    def __init__(
        self,
        rates: Rates,
        progress: Progress,
        writer: MetricsWriter | None,
        log_every: int,
        max_bad_steps: int,
        last: int | None = None,
        streams: Callable[[int], Mapping[str, int]] | None = None,
    ):
        self._rates, self._progress, self._writer = rates, progress, writer
        self._log_every, self._max_bad_steps, self._last = log_every, max_bad_steps, last
        self._streams, self._values = streams, collections.defaultdict[str, list[float]](list)
        self._open: collections.deque[tuple[int, Mapping[str, Any], float, float, StepFlops]] = collections.deque()
        self._failure: OSError | None = None

    def dispatched(self, step: int, metrics: Mapping[str, Any], tokens: float, waited: float, flops: StepFlops) -> None:
        """Takes over the metrics (device scalars) of a step that was just started; the rest is as for `Rates.step`.

        Raises:
          Diverged: `max_bad_steps` steps in a row were not finite.
        """
        self._open.append((step, metrics, tokens, waited, flops))
        while len(self._open) > self.LAG:
            self._finish(*self._open.popleft())

    def settle(self) -> None:
        """Waits for every dispatched step. Raises as `dispatched` does."""
        while self._open:
            self._finish(*self._open.popleft())

    def _finish(self, step: int, metrics: Mapping[str, Any], tokens: float, waited: float, flops: StepFlops) -> None:
        bad = int(metrics["bad_steps_in_a_row"])
        self._rates.step(tokens, waited, flops.of(metrics))
        self._progress.advance(step)
        if bad >= self._max_bad_steps:
            raise Diverged(
                f"{bad} steps in a row, up to step {step}, had a loss or gradient that is not finite; they changed "
                "nothing. The learning rate, the precision or the data is wrong; earlier checkpoints are sound"
            )
        if self._streams is not None and not bad:
            for name in metrics.keys() - set(self.OF_THE_STEP):
                self._values[name].append(float(metrics[name]))
        if self._log_every and (step % self._log_every == 0 or step == self._last):
            values = {name: float(value) for name, value in metrics.items()} | self._means(step) | self._rates.report()
            self._write(step, values)
            self._progress.report(step, values)

    def _means(self, step: int) -> dict[str, float]:
        """What streams add to the report of a step."""
        if self._streams is None:
            return {}
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means | {f"steps/{name}": count for name, count in self._streams(step).items()}

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and shows the metrics of an evaluation."""
        self._write(step, {f"eval/{name}": value for name, value in values.items()})
        self.say(f"step {step} | " + " | ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def say(self, line: str) -> None:
        """Prints a line between the progress reports."""
        self._progress.say(line)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """Only the first host writes, so a failure waits for `paused`, where all hosts hear of it and stop."""
        if self._writer is not None and self._failure is None:
            try:
                self._writer.write(step, values)
            except OSError as error:
                self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise UserError(f"{METRICS}: {self._failure.strerror or self._failure}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Settles, and leaves what happens inside out of the rates.

        Raises:
          UserError: on every host, when metrics could not be written.
        """
        from vlm.checkpoint.processes import from_primary  # loads jax, which `train.py --help` does without

        self.settle()
        from_primary(self._raise_failure)
        began = time.monotonic()
        yield
        self._rates.pause(time.monotonic() - began)


class Diverged(RuntimeError):
    """Training cannot go on: too many consecutive steps were not finite."""


def _parts(values: Mapping[str, float]) -> list[str]:
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4g}")
    if "steps_per_second" in values:
        parts.append(f"{values['steps_per_second']:.3g} steps/s")
    if "examples_per_second" in values:
        parts.append(f"{values['examples_per_second']:.4g} examples/s")
    if "mfu" in values:
        parts.append(f"mfu {values['mfu']:.1%}")
    if "data_wait_share" in values:
        parts.append(f"data wait {values['data_wait_share']:.0%}")
    if values.get("bad_steps"):
        parts.append(f"{values['bad_steps']:.0f} bad steps")
    return parts


def duration(seconds: float) -> str:
    """Seconds as "3h59m", "4m05s" or "12s"."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
