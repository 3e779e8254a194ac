"""Joining several hosts: what is incomplete or wrong ends in one line; nothing given means one host.

And the commands that share one folder, on two real processes.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import pytest

import vlm
from vlm import precompute
from vlm.config import build, parse_config_flag
from vlm.errors import UserError
from vlm.hosts import add_host_flags, connect
from vlm.models.flava import FLAVA, FLAVAConfig
from vlm.schema import Config


@pytest.fixture
def joined(monkeypatch):
    """Records calls of jax.distributed.initialize."""
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    return calls


def _connect(*flags):
    parser = argparse.ArgumentParser()
    add_host_flags(parser)
    connect(parser.parse_args(flags))


def test_alone_by_flags_by_environment_and_by_cluster(joined, monkeypatch):
    _connect()
    assert joined == []
    _connect("--coordinator=a:1", "--num_processes=2", "--process_id=1")
    _connect("--distributed")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    _connect()
    assert joined == [("a:1", 2, 1), (None, None, None), ("b:2", 4, 3)]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--num_processes=2"], {}, "need --coordinator"),
        (["--coordinator=a"], {}, "expected HOST:PORT, found 'a'"),
        (["--coordinator=a:1"], {}, "needs --num_processes and --process_id"),
        ([], {"JAX_COORDINATOR_ADDRESS": "a:1"}, "needs --num_processes and --process_id"),
        ([], {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: expected a number .* found 'two'"),
    ],
)
def test_what_is_incomplete_is_named(joined, monkeypatch, flags, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        _connect(*flags)
    assert joined == []


def test_a_failure_of_jax_is_one_line(monkeypatch, joined):
    def fail(*_):
        raise ValueError("no cluster")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="joining the other hosts failed: no cluster"):
        _connect("--distributed")


TASKS = """
from ml_collections import ConfigDict

DATA = {"kind": "json", "path": "data/caption_test.json", "split": "[:7]"}
TASK = {"kind": "retrieval", "data": DATA, "text": "caption", "batch_size": 4, "bootstrap": {"resamples": 0}, "k": (1,)}
ROW = {"metric": "recall", "of": ("pairs/text_to_image_recall@1",), "paper": {"ours": 50.0}}


def get_config():
    task = {"key": "small", "name": "Small", "group": "all", "eval": {"pairs": TASK}, "rows": (ROW,)}
    return ConfigDict({"compare": "ours", "averages": ("all",), "tasks": (task,)})
"""
PROGRAM = """
import importlib, json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
for name, arguments in json.loads(sys.argv[3]):
    assert importlib.import_module(name).main(arguments) == 0
"""


@pytest.fixture
def words(tmp_path, scenes_folder):
    """The command that computes visual words of a few scenes with a random codebook, but for its output."""
    (tmp_path / "scenes").symlink_to(scenes_folder)
    settings = build(Config, parse_config_flag(f"configs/flava.py:tiny,{tmp_path}"), "")
    config = build(FLAVAConfig, settings.model, "model")
    alone = dict.fromkeys(("vision", "text", "fusion", "projection_dim"), None)
    model = FLAVA(dataclasses.replace(config, **alone, heads=False))
    vlm.save(tmp_path / "codebook", model, nn.unbox(jax.jit(model.init)(jax.random.key(3)))["params"])
    init = f"--config.init=({{'path': '{tmp_path / 'codebook'}'}},)"
    command = [f"--config=configs/flava.py:tiny,{tmp_path}", init, "--config.processor.augment=None"]
    return [*command, "--batch_size=2", "--part_size=3"]


def test_two_hosts_make_what_one_makes(words, tiny_flava, scenes_folder, tmp_path):
    assert precompute.main([*words, f"--output={tmp_path / 'one'}"]) == 0
    vlm.save(tmp_path / "model", *tiny_flava())
    (tmp_path / "tasks.py").write_text(TASKS)
    tasks = [f"--config={tmp_path / 'tasks.py'}", f"--checkpoint={tmp_path / 'model'}", f"--data={scenes_folder}"]
    tasks = "vlm.tasks", [*tasks, f"--output={tmp_path / 'results'}"]
    commands = json.dumps([("vlm.precompute", [*words, f"--output={tmp_path / 'two'}"]), tasks, tasks])
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    program = [sys.executable, "-c", PROGRAM, f"localhost:{port}"]
    hosts = [subprocess.Popen([*program, str(host), commands], **pipes) for host in range(2)]
    said = [host.communicate(timeout=120) for host in hosts]
    for host, (_, error) in zip(hosts, said, strict=True):
        assert host.returncode == 0, error[-3000:]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two and not (tmp_path / "two.parts").exists()
    out = [[line for line in out.splitlines() if "[Gloo]" not in line] for out, _ in said]
    assert out[1] == [] and "of 4 pictures" in out[0][0]
    table = out[0][1 : 1 + (len(out[0]) - 1) // 2]
    assert out[0][1:] == table * 2 and json.loads(table[-1])["ours"]["small/recall"] is not None
    assert said[0][1].count("small: Small") == 1 and "small: Small" not in said[1][1]  # then it was read
