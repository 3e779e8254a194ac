"""Two real processes with two devices each write and match as one device does."""

import json
import os
import socket
import subprocess
import sys

import pytest

import vlm
from vlm import evaluation

PROGRAM = """
import sys, json
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import vlm
from vlm import evaluation

mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
everything = {}
with jax.set_mesh(mesh):
    for folder, specs in json.loads(sys.argv[3]).items():
        model, params, processor = vlm.load(folder)
        params = jax.device_put(jax.tree.map(np.asarray, params), NamedSharding(mesh, PartitionSpec()))
        everything |= evaluation.run(specs, model, params, processor, progress=False)
print(json.dumps(everything))
"""


def test_two_processes_equal_one(tiny_blip, scenes_folder, tmp_path):
    captions = {"kind": "json", "path": str(scenes_folder / "caption_test.json"), "split": "[:7]"}
    common = {"batch_size": 4, "bootstrap": {"resamples": 0}}
    kinds = {
        "retrieval": {"kind": "matching_retrieval", "data": captions, "text": "caption", "shortlist": 3},
        "caption": {"kind": "captions", "data": captions, "preset": "greedy", "generation": {"max_new_tokens": 3}},
    }
    specs = {task: {task: spec | common} for task, spec in kinds.items()}
    expected = {}
    for task, each in specs.items():
        vlm.save(tmp_path / task, *tiny_blip(task))
        expected |= evaluation.run(each, *tiny_blip(task), progress=False)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    given = json.dumps({str(tmp_path / task): each for task, each in specs.items()})
    commands = [[sys.executable, "-c", PROGRAM, f"localhost:{port}", str(host), given] for host in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
        assert json.loads(out.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)
