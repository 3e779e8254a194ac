"""Runs that are asked to stop, or must: while data hang, while an evaluation runs, and when one of two hosts fails."""

import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import vlm.evaluation
from vlm.data.loader import Loader

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "train_toy" / "config.py"
train = runpy.run_path(str(ROOT / "train.py"))


@pytest.fixture
def flags(tmp_path):
    """A run of the toy family that saves only where it must."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": str(1000 + i * 2741 % 9000)}) + "\n" for i in range(40)))
    names = f"--config={CONFIG}:{data}", f"--workdir={tmp_path / 'run'}"
    return [*names, "--config.train.tensorboard=False", "--config.train.checkpoint_every=0"]


def saved(tmp_path):
    return sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())


def test_a_signal_while_storage_hangs_saves_what_is_done(tmp_path, flags, monkeypatch, capsys):
    load, hangs = Loader.load_row, threading.Event()

    def load_row(loader, position, *rest):
        if position == 8 * 4:  # the first row of the fifth batch
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hangs.wait(3)
        return load(loader, position, *rest)

    monkeypatch.setattr(Loader, "load_row", load_row)
    assert train["main"]([*flags, "--config.data.prefetch=1"]) == 75
    assert saved(tmp_path) == [4] and "stopped and saved at step 4" in capsys.readouterr().err


def test_a_stopped_evaluation_is_made_up_for_by_the_next_start(tmp_path, flags, monkeypatch, capsys):
    """Of the state that it was to be of: it is durable before an evaluation begins."""
    config = tmp_path / "config.py"
    config.write_text(
        f"import runpy\ndef get_config(data=''):\n    config = runpy.run_path({str(CONFIG)!r})['get_config'](data)\n"
        "    config.eval = {'any': {'kind': 'zero_shot'}}\n    return config\n"
    )
    asked, killed = [], []

    def run(*_, output, about, poll, **__):
        asked.append(about["step"])
        if about["step"] not in killed:
            killed.append(about["step"])
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        output.parent.mkdir(exist_ok=True)
        output.write_text("{}")
        return {"top1": about["step"]}

    monkeypatch.setattr(vlm.evaluation, "prepare", lambda specs: specs)
    monkeypatch.setattr(vlm.evaluation, "check", lambda *_, **__: None)
    monkeypatch.setattr(vlm.evaluation, "run", run)
    flags = [f"--config={config}:{flags[0].partition(':')[2]}", *flags[1:]]
    flags += ["--config.train.eval_every=1", "--config.train.steps=2", "--config.train.log_every=0"]
    for status, steps, last in ((75, [1], 1), (75, [1, 2], 2), (0, [2], 2), (0, [], 2)):
        assert train["main"](flags) == status
        said = capsys.readouterr().err
        assert asked == steps and saved(tmp_path)[-1] == last
        assert ("all 2 steps are done" if status == 0 else f"saved at step {last}") in said
        asked.clear()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/top1"] for line in lines] == [1, 2]


HOST = """
import runpy, sys
import vlm.data.prefetch as prefetch
from vlm.errors import UserError
next_batch = prefetch.Batches.__next__

def fail(batches):
    if batches.step == 5:
        raise UserError("9 of 10 examples were unreadable")
    return next_batch(batches)

if sys.argv[-1] == "--process_id=1":
    prefetch.Batches.__next__ = fail
sys.exit(runpy.run_path("train.py")["main"](sys.argv[1:]))
"""


def test_a_loader_that_fails_on_one_host_stops_both_after_the_same_step(tmp_path, flags):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"--coordinator=localhost:{probe.getsockname()[1]}"
    settings = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [sys.executable, "-c", HOST, *flags, "--config.train.checkpoint_every=2", "--config.train.log_every=0"]
    hosts = [
        subprocess.Popen(
            [*command, address, "--num_processes=2", f"--process_id={index}"],
            env=os.environ | {"XLA_FLAGS": settings},
            **pipes,
        )
        for index in range(2)
    ]
    try:
        first, second = (host.communicate(timeout=60)[1].strip().splitlines() for host in hosts)
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [2, 2], (first, second)
    assert second == ["error: 9 of 10 examples were unreadable"]
    assert first[-1] == "error: another host failed and says why" and len(first) == 3, first
    assert saved(tmp_path) == [2, 4]
