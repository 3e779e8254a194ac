"""Side-by-side timing: contenders alternate in one process; medians and ratios of one run are what counts."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

PAUSE = 0.5
"""Seconds before each timed run: PyTorch's OpenMP threads spin for a while after a call and would slow the next one."""

NAMES = ("vlm", "transformers")
"""Of the contenders that can run alone."""

Times = dict[str, list[tuple[float, float]]]


def alternate(contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2) -> Times:
    """Runs every contender once per round, in turn; returns (wall seconds, CPU seconds) of each timed run."""
    for run in contenders.values():
        for _ in range(warmup):
            run()
    times: Times = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            time.sleep(PAUSE)
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def alternate_alone(module: str, options: argparse.Namespace, **changed: Any) -> Times:
    """The same with a process for every run, `options.alone` of each contender in `NAMES`: `module --only=NAME`, and
    the other `options`, or what is `changed` of them.
    """
    given = {name: value for name, value in (vars(options) | changed).items() if name not in ("only", "alone")}
    given = {name: value for name, value in given.items() if value is not None and value is not False and value != ""}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    times: Times = {}
    for number in range(options.alone):
        for name in NAMES if number % 2 == 0 else reversed(NAMES):
            command = [sys.executable, "-m", module, f"--only={name}", *flags]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            record = next(json.loads(line) for line in lines if line.startswith("{"))
            for run, seconds in record["seconds"].items():
                times.setdefault(run, []).append((seconds, record["cpu_seconds"][run]))
    return times


def report(
    name: str, times: Times, *, reference: str, settings: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Prints and returns one JSON line: medians, and how many times faster each contender is than `reference`."""
    wall = {key: statistics.median(w for w, _ in runs) for key, runs in times.items()}
    cpu = {key: statistics.median(c for _, c in runs) for key, runs in times.items()}
    packages = {}
    for package in ("jax", "torch", "transformers", "numpy"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    record = {
        "benchmark": name,
        "seconds": {key: round(value, 4) for key, value in wall.items()},
        "cpu_seconds": {key: round(value, 4) for key, value in cpu.items()},
        "times_faster": {key: round(wall[reference] / value, 3) for key, value in wall.items()},
        "times_faster_cpu_time": {key: round(cpu[reference] / value, 3) for key, value in cpu.items()},
        "reference": reference,
        "rounds": len(next(iter(times.values()))),
        "settings": dict(settings or {}),
        **more,
        "load": round(os.getloadavg()[0], 2),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": packages,
    }
    print(json.dumps(record))
    return record
