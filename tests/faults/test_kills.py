"""Runs that are killed, at random and at chosen moments, and resumed: the result is that of the undisturbed run."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys

import pytest

from vlm.checkpoint import verify_step
from vlm.checkpoint.steps import step_numbers

HERE = pathlib.Path(__file__).parent
KILLS, KILLS_PER_RUN, STEPS, SEED = 25, 5, 16, 20261121
POINTS = ("blocking", "orbax_done", "manifest", "renamed", "deletion", "deleted")  # of warm_runs.py


class Runs:
    """Talks to the process that forks the runs."""

    def __init__(self, cache):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "PYTHONPATH": str(HERE.parents[1]),
            "JAX_COMPILATION_CACHE_DIR": str(cache),  # compile the step once, not in every run
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, str(HERE / "warm_runs.py")]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        os.set_blocking(self.process.stderr.fileno(), False)

    def __call__(self, workdir, **request):
        self.process.stdin.write(json.dumps({"workdir": str(workdir)} | request) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        self.errors = ""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.process.stderr.fileno(), 65536):
                self.errors += data.decode()
        return status


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = Runs(tmp_path_factory.mktemp("cache"))
    yield started
    started.process.communicate()


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory):
    """The final state's digest of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("cold", "warm"):  # compiled, and with the compiled step from the cache
        assert runs(folder / name) == 0, runs.errors
    digests = {(folder / name / "final").read_text() for name in ("cold", "warm")}
    assert len(digests) == 1
    return digests.pop()


def check_workdir(workdir):
    """Whatever has a plain number is complete, and everything that was reported durable is there."""
    steps = step_numbers(workdir / "checkpoints")
    for step in steps:
        verify_step(workdir / "checkpoints" / str(step))
    log = (workdir / "log").read_text() if (workdir / "log").exists() else ""
    durable = [int(step) for step in re.findall(r"durable (\d+)", log)]
    assert max(durable, default=0) <= max(steps, default=0)
    return max(steps, default=0)


def test_random_kills(runs, undisturbed, tmp_path):
    chance = random.Random(SEED)
    kills, number, left = 0, 0, []
    while kills < KILLS:
        workdir, reached = tmp_path / f"run{number}", 0
        number += 1
        for _ in range(min(KILLS_PER_RUN, KILLS - kills)):
            moment = chance.randrange(max(1, STEPS - reached)), chance.random()
            status = runs(workdir, kill_after=moment)
            if status == 0:
                break
            assert status == -signal.SIGKILL, runs.errors
            kills += 1
            reached = check_workdir(workdir)
            left.append(reached)
        if not (workdir / "final").exists():
            assert runs(workdir) == 0, runs.errors
        assert (workdir / "final").read_text() == undisturbed
    print(f"{kills} kills in {number} runs left the steps {left}")
    assert len(set(left)) >= 4, f"the kills must hit many moments, they left only the steps {left}"


@pytest.mark.parametrize("point", POINTS)
def test_kill_at(runs, undisturbed, tmp_path, point):
    workdir = tmp_path / "run"
    assert runs(workdir, die_at=point) == -signal.SIGKILL, runs.errors
    left = check_workdir(workdir)
    assert left >= 6 if point != "renamed" else left == 8
    assert runs(workdir) == 0, runs.errors
    assert (workdir / "final").read_text() == undisturbed
    names = [path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(names) == ["14", "16"]


def test_full_disk(runs, tmp_path):
    """Writing beyond a limit fails as a full disk does: the run ends with one line, the steps before stay."""
    workdir = tmp_path / "run"
    assert runs(workdir, file_limit=1024) == 2, runs.errors
    assert runs.errors.splitlines()[-1] == (
        "error: checkpoint of step 8 failed: File too large; the newest complete step is 6"
    )
    assert check_workdir(workdir) == 6
    assert step_numbers(workdir / "checkpoints") == [4, 6]
    assert runs(workdir) == 0, runs.errors
