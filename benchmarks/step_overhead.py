"""What train.py's loop adds to a step.

    python -m benchmarks.step_overhead [--steps=120] [--config.KEY=VALUE …]

Runs the real command on the handwritten digits (a step of tens of milliseconds: the hardest case, since the overhead
of a step does not grow with the model; a larger one: --config.model.vision.num_layers=24), then the same compiled step
alone on the last batch, back to back. Prints one JSON line: milliseconds per step of both, and where the loop's time
goes: calling the step, waiting for it, waiting for data, and the rest; `overhead_share` is what all that adds to the
step alone. `loop_cpu_milliseconds` is what the loop's thread itself computes per step outside the compiled function,
and `loop_cpu_share` its share of the step. On an accelerator that and the loader's work run beside the step; on a CPU
backend both take cycles from it, which is the difference between the two step times.
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
        self.again: Any = None
        self.cpu, self.cpu_in_step, self.cpu_began = 0.0, 0.0, 0.0

    def watch(self) -> None:
        """Wraps the compiled step and the report of every run that follows."""
        compile_step, finish, paused = experiment.compile_step, metrics.Report._finish, metrics.Report.paused

        def timed_compile(*arguments: Any, **options: Any) -> Any:
            step, flops = compile_step(*arguments, **options)

            def timed(state: Any, batch: Any) -> Any:
                began, cpu = time.perf_counter(), time.thread_time()
                result = step(state, batch)
                self.spent["call"] += time.perf_counter() - began
                self.cpu_in_step += time.thread_time() - cpu
                self.steps += 1
                self.again = (step, result[0], batch)
                if self.steps == WARMUP:
                    self.began, self.spent = time.perf_counter(), dict.fromkeys(self.spent, 0.0)
                    self.cpu_began, self.cpu_in_step = time.thread_time(), 0.0
                return result

            return timed, flops

        def timed_finish(report: Any, step: int, values: Any, tokens: float, waited: float, flops: float) -> None:
            began = time.perf_counter()
            jax.block_until_ready(values)
            self.spent["device"] += time.perf_counter() - began
            self.spent["data"] += waited
            finish(report, step, values, tokens, waited, flops)

        @contextlib.contextmanager
        def timed_pause(report: Any) -> Iterator[None]:
            report.settle()
            if self.began and not self.ended:
                self.ended, self.cpu = time.perf_counter(), time.thread_time() - self.cpu_began - self.cpu_in_step
            with paused(report):
                yield

        experiment.compile_step, metrics.Report._finish = timed_compile, timed_finish  # type: ignore[assignment]
        metrics.Report.paused = timed_pause  # type: ignore[assignment]


def alone(again: Any, steps: int) -> float:
    """Seconds per step of the compiled function by itself."""
    step, state, batch = again
    state = jax.block_until_ready(step(state, batch)[0])
    began = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    options, overrides = parser.parse_known_args()
    clock = Clock()
    clock.watch()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "data")
        changes = {"train.steps": options.steps, "train.eval_every": 0, "optimizer.schedule.warmup_steps": 1}
        flags = [f"--config.{key}={value}" for key, value in changes.items()]
        train.main(
            [
                f"--config=configs/digits.py:clip,{folder}",
                f"--workdir={folder}/run",
                "--config.eval={}",
                *flags,
                *overrides,
            ]
        )
    steps, total = clock.steps - WARMUP, clock.ended - clock.began
    own, bare = total - sum(clock.spent.values()), alone(clock.again, steps)
    record = {"benchmark": "step_overhead", "steps": steps, "milliseconds_per_step": round(1e3 * total / steps, 3)}
    record |= {
        "step_alone_milliseconds": round(1e3 * bare, 3),
        "loop_cpu_milliseconds": round(1e3 * clock.cpu / steps, 3),
    }
    record |= {
        "overhead_share": round(total / steps / bare - 1, 4),
        "loop_cpu_share": round(clock.cpu / steps / bare, 4),
    }
    record |= {"overrides": overrides}
    record |= {f"{name}_milliseconds": round(1e3 * spent / steps, 3) for name, spent in clock.spent.items()}
    record |= {"rest_milliseconds": round(1e3 * own / steps, 3)}
    print(json.dumps(record | {"load": round(os.getloadavg()[0], 2)}))


if __name__ == "__main__":
    main()
