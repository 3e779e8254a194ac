"""What train.py's loop adds to a step: host time outside the compiled function, and outside waiting for it or for data.

    python -m benchmarks.step_overhead [--steps=120]

Runs the real command on the handwritten digits (a step of tens of milliseconds: the hardest case, since the overhead
of a step does not grow with the model) and reports the loop's own milliseconds and share as one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

import train
from vlm import experiment, metrics
from vlm.demo.prepare import prepare

WARMUP = 20


class Clock:
    """Seconds by what the loop was doing, from step `WARMUP` to the first pause of the report."""

    def __init__(self) -> None:
        self.steps, self.spent = 0, {"call": 0.0, "device": 0.0, "data": 0.0}
        self.began = self.ended = 0.0

    def watch(self) -> None:
        """Wraps the compiled step and the report of every run that follows."""
        compile_step, finish, paused = experiment.compile_step, metrics.Report._finish, metrics.Report.paused

        def timed_compile(*arguments: Any, **options: Any) -> Any:
            step, flops = compile_step(*arguments, **options)

            def timed(state: Any, batch: Any) -> Any:
                began = time.perf_counter()
                result = step(state, batch)
                self.spent["call"] += time.perf_counter() - began
                self.steps += 1
                if self.steps == WARMUP:
                    self.began, self.spent = time.perf_counter(), dict.fromkeys(self.spent, 0.0)
                return result

            return timed, flops

        def timed_finish(report: Any, step: int, values: Any, tokens: float, waited: float) -> None:
            began = time.perf_counter()
            jax.block_until_ready(values)
            self.spent["device"] += time.perf_counter() - began
            self.spent["data"] += waited
            finish(report, step, values, tokens, waited)

        @contextlib.contextmanager
        def timed_pause(report: Any) -> Iterator[None]:
            report.settle()
            self.ended = self.ended or time.perf_counter()
            with paused(report):
                yield

        experiment.compile_step, metrics.Report._finish = timed_compile, timed_finish  # type: ignore[assignment]
        metrics.Report.paused = timed_pause  # type: ignore[assignment]


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    clock = Clock()
    clock.watch()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "data")
        changes = {"train.steps": options.steps, "train.eval_every": 0, "optimizer.schedule.warmup_steps": 1}
        flags = [f"--config.{key}={value}" for key, value in changes.items()]
        train.main([f"--config=configs/digits.py:clip,{folder}", f"--workdir={folder}/run", "--config.eval={}", *flags])
    steps, total = clock.steps - WARMUP, clock.ended - clock.began
    own = total - sum(clock.spent.values())
    record = {"benchmark": "step_overhead", "steps": steps, "milliseconds_per_step": round(1e3 * total / steps, 3)}
    record |= {f"{name}_milliseconds": round(1e3 * spent / steps, 3) for name, spent in clock.spent.items()}
    record |= {"loop_milliseconds": round(1e3 * own / steps, 3), "loop_share": round(own / total, 4)}
    print(json.dumps(record | {"load": round(os.getloadavg()[0], 2)}))


if __name__ == "__main__":
    main()
