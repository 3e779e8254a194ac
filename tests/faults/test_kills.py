"""Runs that are killed, at random and at chosen moments, and resumed: the result is that of the undisturbed run."""

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
KILLS, KILLS_PER_RUN, SEED = 25, 5, 20261121
POINTS = ("blocking", "orbax_done", "manifest", "renamed", "deletion", "deleted")  # of warm_runs.py


class Runs:
    """Talks to the process that forks the runs."""

    def __init__(self, stderr, cache):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "PYTHONPATH": str(HERE.parents[1]),
            "JAX_COMPILATION_CACHE_DIR": str(cache),  # compile the step once, not in every run
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, str(HERE / "warm_runs.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def __call__(self, workdir, **request):
        self.process.stdin.write(json.dumps({"workdir": str(workdir)} | request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def stderr(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "stderr"


@pytest.fixture(scope="module")
def runs(stderr):
    with stderr.open("w") as file:
        started = Runs(file, stderr.parent / "cache")
        yield started
        started.process.communicate()


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory):
    """The final parameters' digest and the seconds of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert runs(folder / "cold")["status"] == 0
    answer = runs(workdir := folder / "warm")
    assert answer["status"] == 0 and (workdir / "final").read_text() == (folder / "cold" / "final").read_text()
    return (workdir / "final").read_text(), answer["seconds"]


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
    expected, seconds = undisturbed
    chance = random.Random(SEED)
    kills, number, resumed = 0, 0, []
    while kills < KILLS:
        workdir = tmp_path / f"run{number}"
        number += 1
        for _ in range(min(KILLS_PER_RUN, KILLS - kills)):
            answer = runs(workdir, kill_after=chance.uniform(0, seconds))
            if answer["status"] == 0:
                break
            assert answer["status"] == -signal.SIGKILL
            kills += 1
            resumed.append(check_workdir(workdir))
        if not (workdir / "final").exists():
            assert runs(workdir)["status"] == 0
        assert (workdir / "final").read_text() == expected
    print(f"{kills} kills in {number} runs left the steps {resumed}")
    assert len(set(resumed)) >= 4, f"the kills must hit many moments, they left only the steps {resumed}"


@pytest.mark.parametrize("point", POINTS)
def test_kill_at(runs, undisturbed, tmp_path, point):
    workdir = tmp_path / "run"
    assert runs(workdir, die_at=point)["status"] == -signal.SIGKILL
    left = check_workdir(workdir)
    assert left >= 6 if point != "renamed" else left == 8
    answer = runs(workdir)
    assert answer["status"] == 0
    assert (workdir / "final").read_text() == undisturbed[0]
    names = [path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(names) == ["14", "16"]


def test_full_disk(runs, stderr, tmp_path):
    """Writing beyond a limit fails as a full disk does: the run ends with one line, the steps before stay."""
    workdir = tmp_path / "run"
    written = stderr.stat().st_size
    assert runs(workdir, file_limit=1024)["status"] == 2
    message = stderr.read_text()[written:]
    assert message.splitlines()[-1] == (
        "error: checkpoint of step 8 failed: File too large; the newest complete step is 6"
    )
    assert check_workdir(workdir) == 6
    assert step_numbers(workdir / "checkpoints") == [4, 6]
    assert runs(workdir)["status"] == 0
